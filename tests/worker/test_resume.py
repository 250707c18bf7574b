"""Models that a run owes are made from its checkpoints alone, proven, and without its code."""

from __future__ import annotations

import json
import logging
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

import onnx
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback
from mlflow import MlflowClient
from torch import nn

import onnxport
from onnxport import Background, ConfigurationError, MLflow, OnnxExport, Tolerance, Verify
from onnxport._files import ending_of
from onnxport.callbacks.owed import note, owed
from onnxport.callbacks.runner import Outcome
from onnxport.callbacks.session import ExportSession, Saved
from onnxport.config import ExportOptions
from onnxport.exporter.ownership import read_metadata
from onnxport.report import Provenance
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
                while not export.reports:
                    time.sleep(0.05)
                os.kill(worker_for(OPTIONS, 0).pid, signal.SIGSTOP)
            if trainer.current_epoch == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    data = [{"series": torch.randn(5, 6)} for _ in range(12)]
    export = OnnxExport(background=OPTIONS, core=sys.argv[1])
    trainer = pl.Trainer(
        max_epochs=9, logger=False, default_root_dir=".", enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False,
        callbacks=[ModelCheckpoint("c", save_top_k=-1), export, Kill()],
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


@pytest.mark.parametrize("core", [pytest.param("dynamo", marks=pytest.mark.exhaustive), "trace"])
def test_a_killed_run_is_finished_without_its_script(core: str, tmp_path: Path) -> None:
    folder = killed_run(tmp_path, core)
    assert len(names(folder, "*.ckpt")) == 3
    assert len(names(folder, "*.onnx")) == 1
    assert len(names(folder, ".*.pending")) == 2
    moved = shutil.move(folder, tmp_path / "elsewhere")
    run = command("resume", str(tmp_path))
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
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


class Clamped(nn.Module):
    """Has a limit that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 3)
        self.limit = 1e3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.flatten(1)).clamp(-self.limit, self.limit)


class Stop(Callback):
    """Stops the worker when the first model is there, and may change the module then."""

    def __init__(self, export: OnnxExport, limit: float | None = None) -> None:
        self.export = export
        self.limit = limit
        self.pid = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            while not self.export.reports:
                time.sleep(0.05)
            self.pid = worker_for(NO_WAIT, 0).pid or 0
            assert self.pid > 0
            os.kill(self.pid, signal.SIGSTOP)
            pl_module.net.limit = self.limit or pl_module.net.limit

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        with suppress(ProcessLookupError):  # the next test must not get a process that sleeps
            os.kill(self.pid, signal.SIGKILL)


def damage(note: Path) -> None:
    note.write_bytes(note.read_bytes()[:100])


def run_that_does_not_wait(
    tmp_path: Path, *, limit: float | None = None, filename: str | None = None, **options: Any
) -> Path:
    """Train for two epochs and leave the last model to be made."""
    folder = tmp_path / "checkpoints"
    verify = Verify(tolerance=Tolerance(rtol=0.25, atol=0.5))
    export = OnnxExport(background=NO_WAIT, verify=verify, **{"core": "trace"} | options)
    checkpoints = zoo.checkpoints(tmp_path, save_top_k=-1, filename=filename)
    trainer = zoo.trainer(tmp_path, checkpoints, export, Stop(export, limit), epochs=2)
    trainer.fit(zoo.Classifier(Clamped()), zoo.loader())
    assert [report.ok for report in export.reports] == [True, False]
    (debt,) = owed([tmp_path])
    assert export.reports[1].checkpoint == str(debt.checkpoint)
    return folder


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_that_does_not_wait(tmp_path_factory.mktemp("run"))


@pytest.fixture
def owing(run_once: Path, tmp_path: Path) -> Path:
    """The folder of a run that did not wait for the last of its two models."""
    folder = shutil.copytree(run_once, tmp_path / "checkpoints")
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


def test_a_resumed_model_is_told_to_the_server_of_its_run(store: str, tmp_path: Path) -> None:
    folder = run_that_does_not_wait(
        tmp_path, mlflow=MLflow(tracking_uri=store, register="n", policy="all")
    )
    run = command("resume", str(folder))
    assert run.returncode == 0, run.stderr
    assert f"of the models: `onnxport sync {folder}`." in run.stdout
    told = onnxport.sync(folder)
    assert [record.missing for record in told.values() if record.missing] == []
    client = MlflowClient(store)
    versions = client.search_model_versions("name = 'n'")
    hashes = {version.tags["onnxport.weights_sha256"] for version in versions}
    assert hashes == {read_metadata(path)["weights_sha256"] for path in folder.glob("*.onnx")}
    assert len(versions) == len({version.run_id for version in versions}) + 1 == 2
    assert names(folder, ".*") == []


def note_of(checkpoint: Path) -> None:
    """Make a note one of the checkpoint as it is now, and of what was computed before."""
    (note,) = checkpoint.parent.glob(f".{checkpoint.stem}.onnx.pending")
    content = torch.load(note, weights_only=True)
    content["saved"] = ending_of(checkpoint)
    torch.save(content, note)


def test_other_weights_than_those_that_the_module_had_are_no_model(owing: Path) -> None:
    checkpoint = checkpoint_of(owing)
    content = torch.load(checkpoint, weights_only=False)
    content["state_dict"]["net.net.bias"] += 3.0
    torch.save(content, checkpoint)
    (report,) = onnxport.resume(owing)
    assert "is another one than when its model was noted" in str(report.error)
    note_of(checkpoint)
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
    content["state_dict"]["net.net.bias"] = torch.zeros(4)
    torch.save(content, checkpoint)
    note_of(checkpoint)
    (report,) = onnxport.resume(owing)
    assert "of another shape" in str(report.error)


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def external(name: str) -> bytes:
    """Return a graph with a tensor whose bytes are in another file."""
    tensor = onnx.TensorProto(name="t", dims=[1], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value="../secret")
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    graph = onnx.helper.make_graph([node], "g", [], [])
    model = onnx.helper.make_model(graph)
    return bytes((graph if name == "graph" else model).SerializeToString())


def as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize(
    "damage", ["gone", "half", "evil", "another version", "outer graph", "outer piece"]
)
def test_without_a_good_template_nothing_is_made_and_nothing_is_run(
    damage: str, owing: Path, tmp_path: Path
) -> None:
    (debt,) = owed([owing])
    template = debt.template
    assert template is not None
    content = torch.load(template, weights_only=True)
    if damage == "gone":
        template.unlink()
    elif damage == "half":
        template.write_bytes(template.read_bytes()[:1000])
    elif damage == "evil":
        torch.save(content | {"noise": Evil(tmp_path / "evil")}, template)
    elif damage == "outer graph":
        torch.save(content | {"graph": as_tensor(external("graph"))}, template)
    elif damage == "outer piece":
        piece = {"model": as_tensor(external("model"))}
        piece |= {"sources": [], "elem_types": [], "outputs": []}
        torch.save(content | {"pieces": [piece]}, template)
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
    assert [report.ok for report in onnxport.resume(owing)] == [False]
    torch.save({"name": Evil(tmp_path / "evil")}, marker)
    assert [report.ok for report in onnxport.resume(owing)] == [False]
    assert not (tmp_path / "evil").exists()


def test_a_note_without_a_run_of_the_module_is_for_the_next_fit(owing: Path) -> None:
    (debt,) = owed([owing])
    note(debt.model, "", debt.origin)
    (report,) = onnxport.resume(owing)
    assert "It is not noted what the module computes" in str(report.error)


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
    assert run.returncode == 2
    assert "pip install 'onnxport[cli]'" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.exhaustive
def test_a_module_that_changed_in_what_is_no_weight_is_for_the_next_fit(tmp_path: Path) -> None:
    folder = run_that_does_not_wait(tmp_path, limit=1e2)
    (report,) = onnxport.resume(folder)
    assert "changed in what is no weight" in str(report.error)
    assert "limit" in str(report.error)


def softmax(module: Any) -> nn.Module:
    return nn.Sequential(module, nn.Softmax(-1))


@pytest.mark.exhaustive
def test_a_note_belongs_to_the_graph_of_its_own_run(tmp_path: Path) -> None:
    folder = run_that_does_not_wait(tmp_path / "a", filename="plain-{epoch}")
    other = run_that_does_not_wait(tmp_path / "b", filename="wrapped-{epoch}", target=softmax)
    for file in other.iterdir():
        shutil.move(file, folder)
    reports = {Path(str(r.checkpoint)).stem: r for r in onnxport.resume(folder)}
    assert {name: report.ok for name, report in reports.items()} == {
        "plain-epoch=1": True,
        "wrapped-epoch=1": False,
    }
    assert not (folder / "wrapped-epoch=1.onnx").exists()


def test_notes_that_make_no_sense_hide_no_good_one(owing: Path) -> None:
    (debt,) = owed([owing])
    good = torch.load(next(owing.glob(".*.pending")), weights_only=True)
    origin = json.loads(good["origin"])
    wrong = {
        "number": {"origin": json.dumps(origin | {"checkpoint": 5})},
        "long": {"origin": json.dumps(origin | {"checkpoint": "x" * 5000})},
        "way": {"template": "../x.onnxport-template"},
        "tolerance": {"options": json.dumps({"tolerance": {"x": 1}})},
        "outputs": {"reference": good["reference"] | {"outputs": [1]}},
        "nothing": {"origin": "[]"},
    }
    for name, part in wrong.items():
        torch.save(good | part, owing / f".a-{name}.onnx.pending")
    reports = onnxport.resume(owing)
    assert [report.ok for report in reports].count(True) == 1
    assert len(reports) == len(wrong) + 1
    assert debt.model.exists()
    assert len(names(owing, ".*.pending")) == len(wrong)


@pytest.mark.exhaustive
def test_a_checkpoint_that_cannot_be_found_is_said_and_stays_owed(tmp_path: Path) -> None:
    checkpoints = run_that_does_not_wait(tmp_path, dirpath=str(tmp_path / "models"))
    shutil.move(checkpoints, tmp_path / "elsewhere")
    (report,) = onnxport.resume(tmp_path / "models")
    assert "is not there" in str(report.error)
    shutil.move(tmp_path / "elsewhere", checkpoints)
    assert [report.ok for report in onnxport.resume(tmp_path / "models")] == [True]


class Patient:
    """A runner that finishes its jobs when it is told to."""

    def __init__(self) -> None:
        self.finish: list[Any] = []

    def run(self, job: Any, live: Any, file: Any, finished: Any) -> None:
        self.finish.append(finished)


def test_an_older_order_does_not_settle_what_is_owed_anew(tmp_path: Path) -> None:
    runner = Patient()
    options = ExportOptions.of(core="auto", inputs=None, opset=None, precision=None, verify=True)
    module = nn.Linear(2, 2)
    session = ExportSession(module, options, runner=runner)  # type: ignore[arg-type]
    (tmp_path / "last.ckpt").touch()
    origin = Provenance(checkpoint=str(tmp_path / "last.ckpt"))
    for _ in range(2):
        session.saved(Saved(state=module.state_dict(), path=tmp_path / "last.onnx", origin=origin))
    for finished, left in zip(runner.finish, (1, 0), strict=True):
        finished(Outcome(None))
        assert len(list(owed([tmp_path]))) == left


class Sharp(zoo.Classifier):
    """Divides by a number that is no weight and is not in the checkpoint."""

    def __init__(self, temperature: float) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
        self.temperature = temperature

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return super().forward(image) / self.temperature


@pytest.mark.parametrize("now", [0.5, 1.0])
def test_the_next_fit_makes_what_is_owed_only_as_the_module_was_then(
    tmp_path: Path, now: float
) -> None:
    checkpoints = zoo.checkpoints(tmp_path, save_top_k=-1)
    first = OnnxExport(core="trace", background=Background(drain_s=0))
    zoo.trainer(tmp_path, checkpoints, first, epochs=1).fit(Sharp(0.5), zoo.loader())
    folder = tmp_path / "checkpoints"
    debts = list(owed([folder]))
    if not debts:
        pytest.skip("the machine was quick enough")
    again = OnnxExport(core="trace", background=Background(drain_s=300))
    module = Sharp(now)
    later = zoo.checkpoints(tmp_path, save_top_k=-1, filename="later-{epoch}")
    zoo.trainer(tmp_path, later, again, epochs=1).fit(module, zoo.loader())
    made = [debt.model.exists() for debt in debts]
    assert made == [now == 0.5] * len(debts)
    assert [debt.model for debt in owed([folder])] == ([] if now == 0.5 else [debts[0].model])
    assert [report.ok for report in again.reports].count(False) == (now != 0.5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("limit", "made"), [(1e2, True), (5e1, False)])
def test_a_number_that_no_row_reaches_must_be_as_it_was_then(
    tmp_path: Path, limit: float, made: bool
) -> None:
    folder = run_that_does_not_wait(tmp_path, limit=1e2)
    (debt,) = owed([folder])
    module = zoo.Classifier(Clamped())
    module.net.limit = limit
    again = OnnxExport(core="trace", background=Background(drain_s=300))
    later = zoo.checkpoints(tmp_path, save_top_k=-1, filename="later-{epoch}")
    zoo.trainer(tmp_path, later, again, epochs=1).fit(module, zoo.loader())
    assert debt.model.exists() is made
    failed = [report.error for report in again.reports if not report.ok]
    assert len(failed) == (not made)
    assert all("net.limit changed" in str(error) for error in failed)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a person is told; events say the same, and are there if another test lets INFO pass."""
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.exhaustive
def test_one_line_names_the_checkpoint_that_was_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_that_does_not_wait(tmp_path)
    (debt,) = owed([folder])
    (line,) = [line for line in warnings(caplog) if "not finished" in line]
    assert line.startswith(f"No ONNX model for {debt.checkpoint.name} [OX600]: ")
    assert line.endswith("with this checkpoint folder makes it.")


def test_the_next_fit_makes_the_model_of_a_damaged_note(owing: Path, tmp_path: Path) -> None:
    (marker,) = owing.glob(".*.pending")
    damage(marker)
    export = OnnxExport(core="trace", background=False)
    saves = zoo.checkpoints(tmp_path, save_top_k=-1, filename="later-{epoch}")
    zoo.trainer(tmp_path, saves, export, epochs=1).fit(zoo.Classifier(Clamped()), zoo.loader())
    assert [report.error for report in export.reports] == [None, None]
    checkpoints = {path.stem for path in owing.glob("*.ckpt")}
    assert {path.stem for path in owing.glob("*.onnx")} == checkpoints


def test_the_next_fit_tells_of_a_damaged_note_of_an_unknown_checkpoint(
    owing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (marker,) = owing.glob(".*.pending")
    checkpoint_of(owing).rename(owing / "moved.ckpt")
    damage(marker)
    export = OnnxExport(core="trace", background=False)
    later = zoo.checkpoints(tmp_path, save_top_k=-1, filename="later-{epoch}")
    zoo.trainer(tmp_path, later, export, epochs=1).fit(zoo.Classifier(Clamped()), zoo.loader())
    (line,) = [line for line in warnings(caplog) if "damaged" in line]
    assert "Remove its .pending file" in line
    assert [report.ok for report in export.reports] == [True]


def test_reports_of_a_relative_folder_name_whole_paths(
    owing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(owing.parent)
    (report,) = onnxport.resume(owing.name)
    assert report.error is None
    assert Path(str(report.checkpoint)).is_absolute()
    assert Path(str(report.path)).is_absolute()


def test_a_file_is_no_folder_of_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    path.touch()
    with pytest.raises(ConfigurationError, match=r"one\.ckpt is a file\. Give the folder"):
        onnxport.resume(path)
