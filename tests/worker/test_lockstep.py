"""Models made in the worker: training is the same, and so are the models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from onnxport import Background, ExportError, OnnxExport, weights_sha256
from onnxport.callbacks.owed import note
from onnxport.callbacks.paths import model_path
from onnxport.exporter.ownership import read_metadata
from onnxport.report import Provenance
from onnxport.worker.client import worker_for

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.worker]

OPTIONS = Background(drain_s=200)


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def stems(folder: Path, suffix: str) -> set[str]:
    return {path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")}


def fit(
    tmp_path: Path, module: Any, export: OnnxExport | None, *others: Callback, **options: Any
) -> Path:
    epochs = options.pop("epochs", 3)
    callbacks = [zoo.checkpoints(tmp_path, **{"save_top_k": -1} | options), *others]
    callbacks += [] if export is None else [export]
    trainer = zoo.trainer(tmp_path, *callbacks, epochs=epochs)
    trainer.fit(module, zoo.loader())
    return tmp_path / "checkpoints"


def assert_lockstep(folder: Path, module: Any, *, image: Any = None) -> None:
    """Each checkpoint has a model with its weights, and nothing else lies about."""
    assert stems(folder, ".onnx") == stems(folder, ".ckpt") != set()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    image = torch.randn(5, 1, 8, 8) if image is None else image
    for checkpoint in folder.glob("*.ckpt"):
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
        path = model_path(checkpoint)
        assert read_metadata(path)["weights_sha256"] == weights_sha256(state)
        module.load_state_dict(state)
        with torch.no_grad():
            expected = module.eval()(image)
        actual = ort.InferenceSession(path).run(None, {"image": image.numpy()})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("core", ["dynamo", "trace"])
def test_later_checkpoints_are_refreshed_and_hold_their_weights(core: str, tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core=core, background=OPTIONS)
    folder = fit(tmp_path, module, export)
    assert [report.error for report in export.reports] == [None] * 3
    assert [report.how for report in export.reports] == ["refresh"] * 3
    assert [report.epoch for report in export.reports] == [0, 1, 2]
    assert [(r.ok, r.how, r.path) for r in export.preflight_reports] == [(True, "export", None)]
    assert_lockstep(folder, module)


def test_training_with_the_worker_is_bit_identical(tmp_path: Path) -> None:
    losses, weights = [], []
    for name, export in (("with", OnnxExport(background=OPTIONS)), ("without", None)):
        torch.manual_seed(3)
        module = zoo.Classifier(zoo.cnn())
        fit(tmp_path / name, module, export)
        losses.append(module.losses)
        weights.append(weights_sha256(module.state_dict()))
    assert losses[0] == losses[1]
    assert weights[0] == weights[1]


def test_averaged_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core="trace", background=OPTIONS)
    folder = fit(tmp_path, module, export, EMAWeightAveraging(decay=0.5))
    for checkpoint in folder.glob("*.ckpt"):
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
        assert read_metadata(model_path(checkpoint))["weights_sha256"] == weights_sha256(state)


def test_removed_checkpoints_take_their_models_with_them(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core="trace", background=OPTIONS)
    options = {"save_top_k": 1, "every_n_train_steps": 1, "save_last": True}
    folder = fit(tmp_path, module, export, epochs=6, **options)
    assert_lockstep(folder, module)


class Temperature(zoo.Classifier):
    """Divides by a number that a schedule changes; the trainer's hooks count epochs, too."""

    def __init__(self) -> None:
        super().__init__(plain_net())
        self.temperature = 1.0
        self.epochs_seen = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image) / self.temperature

    def on_train_epoch_start(self) -> None:
        self.epochs_seen += 1
        if self.current_epoch == 2:
            self.temperature = 1.5


def test_a_number_that_python_changed_is_caught_and_a_counter_does_no_harm(tmp_path: Path) -> None:
    module = Temperature()
    export = OnnxExport(core="trace", background=OPTIONS)
    folder = fit(tmp_path, module, export, epochs=4)
    image = torch.randn(5, 1, 8, 8)
    for report in export.reports:
        assert report.ok
        checkpoint = folder / str(report.checkpoint).rpartition("/")[2]
        module.load_state_dict(torch.load(checkpoint, weights_only=False)["state_dict"])
        module.temperature = 1.0 if report.epoch < 2 else 1.5
        with torch.no_grad():
            expected = module.eval()(image)
        actual = ort.InferenceSession(report.path).run(None, {"image": image.numpy()})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    stale = [r for r in export.reports if r.attempts and not r.attempts[0].ok]
    assert [report.epoch for report in stale if report.how == "export"] != []
    assert all("earlier checkpoint" in report.attempts[0].reason for report in stale)


class Growing(zoo.Classifier):
    """Gets another layer in the middle of training."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.append(nn.Linear(3, 3))


def test_a_module_that_grows_is_exported_anew(tmp_path: Path) -> None:
    module = Growing()
    export = OnnxExport(core="trace", background=OPTIONS)
    fit(tmp_path, module, export)
    assert [report.error for report in export.reports] == [None] * 3
    assert export.reports[-1].ok
    assert {r.how for r in export.reports if r.epoch >= 1} <= {"export", "refresh"}
    assert any("new, gone" in attempt.reason for r in export.reports for attempt in r.attempts)


class Unpicklable(zoo.Classifier):
    """Holds what no other process can have."""

    def __init__(self) -> None:
        super().__init__(plain_net())
        self.socket = (value for value in (1, 2))
        self.function = sys._getframe

    def __getstate__(self) -> Any:
        raise TypeError("this stays here")


def test_what_cannot_be_sent_is_captured_here_and_refreshed_there(tmp_path: Path) -> None:
    module = Unpicklable()
    export = OnnxExport(core="trace", background=OPTIONS)
    folder = fit(tmp_path, module, export)
    assert [report.error for report in export.reports] == [None] * 3
    assert [report.how for report in export.reports] == ["refresh"] * 3
    assert export.preflight_reports[0].how == "export"
    assert_lockstep(folder, module)


class Impossible(nn.Module):
    """What no core takes."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eig(image[:, 0, :3, :3])[0].real


def test_the_preflight_says_early_that_a_module_does_not_export(tmp_path: Path) -> None:
    class Slow(zoo.Classifier):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            time.sleep(0.05)
            return super().training_step(batch, index)

    module = Slow(nn.Sequential(Impossible(), nn.Linear(3, 3)))
    export = OnnxExport(core="trace", background=OPTIONS, preflight="raise")
    with pytest.raises(ExportError, match=r"does not export \[OX300\], so no checkpoint"):
        fit(tmp_path, module, export, epochs=400)
    assert module.current_epoch < 399


class Crash(nn.Module):
    """Ends the process that exports it with dynamo; any other way works."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.net = plain_net()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            if self.how == "exit":
                os._exit(3)
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(1000)
        return self.net(image)


@pytest.mark.exhaustive  # some of it is in the catalogue of faults, too
@pytest.mark.parametrize("how", ["exit", "signal", "hang"])
def test_a_rung_that_ends_the_worker_is_skipped(how: str, tmp_path: Path) -> None:
    module = zoo.Classifier(Crash(how))
    options = Background(drain_s=200, stage_timeout_s=10.0 if how == "hang" else 200.0)
    export = OnnxExport(background=options)
    folder = fit(tmp_path, module, export, epochs=2)
    assert [report.core for report in export.reports] == ["trace", "trace"]
    assert_lockstep(folder, module)


@pytest.mark.exhaustive
def test_a_worker_that_dies_in_the_trial_is_no_verdict_on_the_module(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = OnnxExport(core="dynamo", background=OPTIONS, preflight="raise")
    fit(tmp_path, zoo.Classifier(Crash("exit")), export)
    assert "Whether the module exports is not known yet" in caplog.text
    assert "does not export" not in caplog.text


class KillWorker(Callback):
    """Kills the worker after each epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pid = worker_for(OPTIONS, 0).pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core="trace", background=OPTIONS)
    folder = fit(tmp_path, module, export, KillWorker())
    assert [report.error for report in export.reports] == [None] * 3
    assert_lockstep(folder, module)


def test_what_an_earlier_run_owes_is_made_by_the_next(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    folder = fit(tmp_path, module, None, epochs=2)
    for checkpoint in folder.glob("*.ckpt"):
        note(model_path(checkpoint), "", Provenance(checkpoint=str(checkpoint), epoch=7))
    note(folder / "gone.onnx", "", Provenance(checkpoint=str(folder / "gone.ckpt")))
    (folder / ".onnxport-left").mkdir()
    export = OnnxExport(core="trace", background=OPTIONS)
    fit(tmp_path, module, export, epochs=1, filename="again-{epoch}")
    assert [report.error for report in export.reports] == [None] * 3
    assert sorted(report.epoch for report in export.reports) == [0, 7, 7]
    assert_lockstep(folder, module)


def test_a_time_limit_at_the_end_leaves_what_is_owed_to_the_next_fit(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core="trace", background=Background(drain_s=0))
    folder = fit(tmp_path, module, export, epochs=1)
    missing = [report for report in export.reports if not report.ok]
    if missing:  # a fast machine may have been ready
        assert "was not finished" in str(missing[0].error)
        assert [path.name for path in folder.iterdir() if path.name.endswith(".pending")]
    again = OnnxExport(core="trace", background=OPTIONS)
    fit(tmp_path, module, again, epochs=2, filename="second-{epoch}")
    assert_lockstep(folder, module)


def test_weights_saved_after_fit_are_waited_for(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    trainer = zoo.trainer(tmp_path, OnnxExport(core="trace", background=OPTIONS))
    trainer.fit(module, zoo.loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert (tmp_path / "after.onnx").exists()


def test_the_memory_ceiling_ends_an_export_and_not_training(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    options = Background(drain_s=200, memory_gb=0.05)
    export = OnnxExport(core="trace", background=options)
    fit(tmp_path, module, export, epochs=1)
    (report,) = export.reports
    assert not report.ok
    assert "It may use 0.05 GB (Background(memory_gb=))." in str(report.error)
    assert "The next fit with this checkpoint folder makes it." in str(report.error)
    assert len(module.losses) == 3
    again = OnnxExport(core="trace", background=OPTIONS)
    folder = fit(tmp_path, module, again, epochs=1, filename="again-{epoch}")
    assert [report.error for report in again.reports] == [None] * 2
    assert_lockstep(folder, module)


@pytest.mark.exhaustive
def test_a_worker_that_dies_leaves_no_older_model_under_the_name(tmp_path: Path) -> None:
    options = {"epochs": 1, "filename": "same", "enable_version_counter": False}
    folder = fit(tmp_path, zoo.Classifier(plain_net()), OnnxExport(core="trace"), **options)
    assert (folder / "same.onnx").exists()
    export = OnnxExport(core="trace", background=Background(drain_s=200, memory_gb=0.05))
    fit(tmp_path, zoo.Classifier(plain_net()), export, **options)
    assert [report.ok for report in export.reports] == [False]
    assert not (folder / "same.onnx").exists()
    assert '"ok": false' in (folder / "same.onnx.json").read_text()
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden == [".same.onnx.pending"]


def test_a_script_without_a_guard_runs_once_and_its_classes_are_sent_by_value(
    tmp_path: Path,
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import lightning.pytorch as pl, torch
            from torch import nn
            from onnxport import OnnxExport

            print("the script runs")

            def double(x):
                return 2 * x

            class Mine(pl.LightningModule):
                def __init__(self):
                    super().__init__()
                    self.net = nn.Linear(4, 2)
                    self.post = lambda x: double(x) + 1

                def forward(self, x):
                    return self.post(self.net(x))

                def training_step(self, batch, _):
                    return self(batch[0]).square().mean()

                def configure_optimizers(self):
                    return torch.optim.SGD(self.parameters(), 0.1)

            data = torch.utils.data.TensorDataset(torch.randn(12, 4))
            export = OnnxExport()
            trainer = pl.Trainer(
                max_epochs=2, callbacks=[export], logger=False, default_root_dir=".",
                enable_progress_bar=False, accelerator="cpu",
            )
            trainer.fit(Mine(), torch.utils.data.DataLoader(data, 4))
            print([(report.ok, report.how, report.error) for report in export.reports])
            """
        )
    )
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert run.stdout.count("the script runs") == 1
    assert "[(True, 'refresh', None)" in run.stdout
    assert "terminate called" not in run.stderr
