"""Models that a run owes are made from its checkpoints alone, proven, and without its code."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback
from torch import nn

import onnxport
from onnxport import Background, ConfigurationError, OnnxExport, Tolerance, Verify
from onnxport.callbacks import owed as owed_module
from onnxport.callbacks.owed import owed, template_path
from onnxport.exporter.ownership import read_metadata
from onnxport.worker.client import worker_for

pytestmark = [pytest.mark.integration, pytest.mark.worker]

KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    import lightning.pytorch as pl, torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from torch import nn
    from onnxport import OnnxExport
    from onnxport.worker.client import worker_for
    from onnxport import Background

    OPTIONS = Background(drain_s=200)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 40, batch_first=True)
            self.norm = nn.BatchNorm1d(40)
            self.head = nn.Linear(40, 3)

        def forward(self, series, scale=None):
            found = self.norm(self.lstm(series)[0][:, -1])
            return {"logits": self.head(found), "norm": found.norm(dim=-1)}

    class Mine(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, batch):
            return self.net(batch["series"])

        def training_step(self, batch, _):
            return self(batch)["logits"].square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Kill(Callback):
        "Stops the worker when the first model is there, and later kills training."

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                while not list(Path("c").glob("*.onnx.json")):
                    time.sleep(0.05)
                os.kill(worker_for(OPTIONS, 0).pid, signal.SIGSTOP)
            if trainer.current_epoch == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    data = [{"series": torch.randn(5, 6)} for _ in range(12)]
    trainer = pl.Trainer(
        max_epochs=9, logger=False, default_root_dir=".", enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False,
        callbacks=[
            ModelCheckpoint("c", save_top_k=-1), OnnxExport(background=OPTIONS, core=sys.argv[1]),
            Kill(),
        ],
    )
    trainer.fit(Mine(), torch.utils.data.DataLoader(data, 4))
"""


def killed_run(folder: Path, core: str = "dynamo") -> Path:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(KILLED))
    run = subprocess.run(
        [sys.executable, str(script), core],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == -9, run.stderr
    script.unlink()
    return folder / "c"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    found = Path(sys.executable).with_name("onnxport")
    return subprocess.run(
        [str(found), *arguments], capture_output=True, text=True, timeout=200, check=False
    )


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


@pytest.mark.parametrize("core", ["dynamo", "trace"])
def test_a_killed_run_is_finished_without_its_script(core: str, tmp_path: Path) -> None:
    folder = killed_run(tmp_path, core)
    assert len(names(folder, "*.ckpt")) == 3
    assert len(names(folder, "*.onnx")) == 1
    assert len(names(folder, ".*.pending")) == 2
    moved = shutil.move(folder, tmp_path / "elsewhere")
    run = command("resume", str(tmp_path))
    assert (run.returncode, run.stderr) == (0, "")
    assert "2 of 2 models made." in run.stdout
    assert "proven, largest error" in run.stdout
    folder = Path(moved)
    assert names(folder, ".*") == []
    models = folder.glob("*.onnx")
    hashes = {path.stem: read_metadata(path)["weights_sha256"] for path in models}
    states = {path.stem: torch.load(path)["state_dict"] for path in folder.glob("*.ckpt")}
    assert hashes == {name: onnxport.weights_sha256(state) for name, state in states.items()}
    again = command("resume", str(folder))
    assert (again.returncode, again.stdout) == (0, "No model is owed here.\n")


NO_WAIT = Background(drain_s=0)


class Stop(Callback):
    """Stops the worker when the first model is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            while not list(self.folder.glob("*.onnx.json")):
                time.sleep(0.05)
            self.pid = worker_for(NO_WAIT, 0).pid or 0
            assert self.pid > 0
            os.kill(self.pid, signal.SIGSTOP)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        with suppress(ProcessLookupError):  # the next test must not get a process that sleeps
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def owing(tmp_path: Path) -> Path:
    """The folder of a run that did not wait for the last of its two models."""
    module = zoo.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    folder = tmp_path / "checkpoints"
    verify = Verify(tolerance=Tolerance(rtol=0.25, atol=0.5))
    export = OnnxExport(core="trace", background=NO_WAIT, verify=verify)
    checkpoints = zoo.checkpoints(tmp_path, save_top_k=-1)
    trainer = zoo.trainer(tmp_path, checkpoints, export, Stop(folder), epochs=2)
    trainer.fit(module, zoo.loader())
    assert [report.ok for report in export.reports] == [True, False]
    assert len(list(owed([folder]))) == 1
    return folder


def checkpoint_of(folder: Path) -> Path:
    (debt,) = owed([folder])
    return debt.checkpoint


def test_a_resumed_model_is_proven_as_the_run_asked_for(owing: Path) -> None:
    (report,) = onnxport.resume(owing)
    assert (report.ok, report.how, report.error) == (True, "refresh", None)
    assert [check.reference for check in report.checks] == ["live"] * 3
    assert report.checks[0].outputs[0].budget >= 0.5
    assert names(owing, ".*") == []
    assert onnxport.resume(owing) == []


def test_other_weights_than_those_that_the_module_had_are_no_model(owing: Path) -> None:
    checkpoint = checkpoint_of(owing)
    content = torch.load(checkpoint, weights_only=False)
    content["state_dict"]["net.1.bias"] += 3.0
    torch.save(content, checkpoint)
    (report,) = onnxport.resume(owing)
    assert not report.ok
    assert "disagree" in str(report.error)
    assert "The next fit" in str(report.error)
    assert not checkpoint.with_suffix(".onnx").exists()
    assert len(list(owed([owing]))) == 1
    run = command("resume", str(owing))
    assert run.returncode == 1
    assert "0 of 1 models made." in run.stdout


def test_a_module_of_another_shape_is_no_model(owing: Path) -> None:
    checkpoint = checkpoint_of(owing)
    content = torch.load(checkpoint, weights_only=False)
    content["state_dict"]["net.1.bias"] = torch.zeros(4)
    torch.save(content, checkpoint)
    (report,) = onnxport.resume(owing)
    assert "of another shape" in str(report.error)


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("damage", ["gone", "half", "evil", "another version"])
def test_without_a_good_template_nothing_is_made_and_nothing_is_run(
    damage: str, owing: Path, tmp_path: Path
) -> None:
    template = template_path(owing / "x.onnx", "")
    content = torch.load(template, weights_only=True)
    if damage == "gone":
        template.unlink()
    elif damage == "half":
        template.write_bytes(template.read_bytes()[:1000])
    elif damage == "evil":
        torch.save(content | {"noise": Evil(tmp_path / "evil")}, template)
    else:
        torch.save(content | {"format": 99}, template)
    (report,) = onnxport.resume(owing)
    assert not report.ok
    assert "The next fit" in str(report.error)
    assert not (tmp_path / "evil").exists()
    assert len(list(owed([owing]))) == 1


def test_an_evil_note_is_not_run(owing: Path, tmp_path: Path) -> None:
    (marker,) = owing.glob(".*.pending")
    marker.write_bytes(pickle.dumps({"name": Evil(tmp_path / "evil")}))
    assert onnxport.resume(owing) == []
    torch.save({"name": Evil(tmp_path / "evil")}, marker)
    assert onnxport.resume(owing) == []
    assert not (tmp_path / "evil").exists()


def test_a_note_without_a_run_of_the_module_is_for_the_next_fit(
    owing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (debt,) = owed([owing])
    monkeypatch.setattr(owed_module, "MAX_REFERENCE_BYTES", 10)
    owed_module.note(debt.model, "", debt.origin, debt.reference)
    (report,) = onnxport.resume(owing)
    assert "Nothing says what the module computes" in str(report.error)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no folder"):
        onnxport.resume(tmp_path / "nowhere")
    run = command("resume", str(tmp_path / "nowhere"))
    assert run.returncode == 2
    assert "There is no folder" in run.stderr


def test_without_typer_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from onnxport.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 1
    assert "pip install 'onnxport[cli]'" in run.stderr
    assert "Traceback" not in run.stderr
