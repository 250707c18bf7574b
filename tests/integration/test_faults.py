"""Bad input and faults: clear errors, nothing half-written, and training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback

from onnxport import ConfigurationError, ExportError, OnnxExport, export

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration


def fit(root: Path, module: Any, callback: OnnxExport, epochs: int = 2, **options: Any) -> Any:
    trainer = zoo.trainer(root, zoo.checkpoints(root), callback, epochs=epochs, **options)
    trainer.fit(module, zoo.loader())
    return trainer


class SaveFirst(Callback):
    """Saves before any batch was seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_without_a_batch_the_report_says_what_to_do(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    first = SaveFirst(tmp_path / "first.ckpt")
    trainer = zoo.trainer(tmp_path, first, zoo.checkpoints(tmp_path), callback, epochs=1)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    early, later = callback.reports
    assert not early.ok
    assert "Run at least one batch" in str(early.error)
    assert "example_input_array" in str(early.error)
    assert later.ok


def test_example_input_array_is_the_fallback(tmp_path: Path) -> None:
    module = zoo.Classifier(zoo.cnn())
    module.example_input_array = torch.randn(4, 1, 8, 8)
    callback = OnnxExport(core="trace")
    first = SaveFirst(tmp_path / "first.ckpt")
    zoo.trainer(tmp_path, first, callback, epochs=1).fit(module, zoo.loader())
    assert callback.reports[0].ok


@pytest.mark.parametrize(
    ("make", "said"),
    [(zoo.PythonInside, "no core can export"), (zoo.NoTranslation, "linalg_eig")],
)
def test_a_model_that_no_core_can_export_is_explained_for_each_core(
    make: Any, said: str, tmp_path: Path
) -> None:
    def losses(root: Path, *callbacks: Any) -> list[float]:
        pl.seed_everything(3)
        module = zoo.Classifier(make())
        zoo.trainer(root, zoo.checkpoints(root), *callbacks).fit(module, zoo.loader())
        return module.losses

    callback = OnnxExport()
    assert losses(tmp_path / "a", callback) == losses(tmp_path / "b")
    for report in callback.reports:
        assert not report.ok
        assert {attempt.core for attempt in report.attempts} == {"dynamo", "trace", "script"}
        assert all(attempt.reason for attempt in report.attempts)
        assert said in report.attempts[0].reason
        assert "zoo.py" in report.attempts[0].reason
    assert list(tmp_path.rglob("*.onnx")) == []


def test_on_error_raise_names_the_operator_and_the_line(tmp_path: Path) -> None:
    callback = OnnxExport(on_error="raise")
    with pytest.raises(ExportError, match=r"linalg_eig.*zoo\.py:\d+ in forward") as caught:
        fit(tmp_path, zoo.Classifier(zoo.NoTranslation()), callback)
    assert caught.value.report == callback.reports[0]
    assert len(callback.reports) == 1


def test_on_error_raise_also_raises_for_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No ONNX model for epoch=0"):
        fit(tmp_path, zoo.Classifier(zoo.PythonInside()), OnnxExport(on_error="raise"), epochs=1)


@pytest.mark.parametrize("make", [zoo.BatchSizeBranch, zoo.BakedShape, zoo.DataBranch])
def test_a_wrong_trace_is_never_published_by_training(make: Any, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    fit(tmp_path, zoo.Classifier(make()), callback)
    assert [report.ok for report in callback.reports] == [False, False]
    assert list(tmp_path.rglob("*.onnx")) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    callback = OnnxExport(core="trace", dirpath=tmp_path / "blocked" / "models")
    fit(tmp_path, zoo.Classifier(zoo.cnn()), callback)
    assert [report.ok for report in callback.reports] == [False, False]
    assert "Cannot write to" in str(callback.reports[0].error)
    assert "dirpath" in str(callback.reports[0].error)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["/bin/umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path, tmp_path: Path) -> None:
    large = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 4000), torch.nn.Linear(4000, 3)
    )
    callback = OnnxExport(core="trace", dirpath=small_disk)
    fit(tmp_path, zoo.Classifier(large), callback)
    assert [report.ok for report in callback.reports] == [False, False]
    assert "Cannot write" in str(callback.reports[0].error)
    # Another run may have more room: the models are owed still.
    assert {path.suffix for path in small_disk.iterdir()} <= {".json", ".pending"}


def test_export_to_a_full_disk_raises(small_disk: Path) -> None:
    large = torch.nn.Linear(64, 4000)
    with pytest.raises(ExportError, match="No space left on device"):
        export(large, torch.randn(4, 64), small_disk / "model.onnx", core="trace")
    assert not (small_disk / "model.onnx").exists()


class Unwilling(zoo.Classifier):
    """Gives no weights the first time that it is asked."""

    asked = 0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("not now")
        return super().state_dict(*args, **kwargs)


def test_an_error_before_the_first_checkpoint_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Unwilling(zoo.cnn())
    callback = OnnxExport(core="trace", preflight=True)
    fit(tmp_path, module, callback, epochs=1)
    assert "onnxport failed at the export before the first checkpoint" in caplog.text
    assert "not now" in caplog.text
    assert [report.ok for report in callback.reports] == [True]


def test_should_export_that_raises_does_not_end_training(tmp_path: Path) -> None:
    class Broken(OnnxExport):
        def should_export(self, trainer: Any, checkpoint: str) -> bool:
            raise ZeroDivisionError

    callback = Broken(core="trace")
    fit(tmp_path, zoo.Classifier(zoo.cnn()), callback)
    assert [report.ok for report in callback.reports] == [True, True]


def test_a_module_that_cannot_be_copied_is_cloned_by_structure(tmp_path: Path) -> None:
    import threading

    class Locked(zoo.Classifier):
        def __init__(self) -> None:
            super().__init__(zoo.cnn())
            self.lock = threading.Lock()

    callback = OnnxExport(core="trace")
    fit(tmp_path, Locked(), callback)
    assert [report.error for report in callback.reports] == [None, None]


def test_state_outside_of_the_module_is_noticed(tmp_path: Path) -> None:
    class Scheduled(zoo.Classifier):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image) * (1 + self.current_epoch)

    callback = OnnxExport(core="trace")
    fit(tmp_path, Scheduled(zoo.cnn()), callback, epochs=3)
    assert [report.ok for report in callback.reports] == [True, False, False]
    assert "state outside of the module" in str(callback.reports[1].error)


def test_nan_weights_are_exported_as_they_are(tmp_path: Path) -> None:
    class Diverges(zoo.Classifier):
        def on_train_epoch_end(self) -> None:
            with torch.no_grad():
                self.net[0].bias[0] = float("nan")

    callback = OnnxExport(core="trace")
    fit(tmp_path, Diverges(zoo.cnn()), callback, epochs=1)
    (report,) = callback.reports
    assert report.ok, report.error


def test_an_error_in_training_leaves_no_hooks(tmp_path: Path) -> None:
    class Fails(zoo.Classifier):
        def on_train_epoch_end(self) -> None:
            raise KeyError("the user's own")

    module = Fails(zoo.cnn())
    with pytest.raises(KeyError, match="the user's own"):
        fit(tmp_path, module, OnnxExport(core="trace"))
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"core": "onnx"}, "core must be one of auto, dynamo"),
        ({"when": "always"}, "when must be 'checkpoint'"),
        ({"verify": False}, "nothing unproven is published"),
        ({"on_error": "ignore"}, "on_error must be one of"),
        ({"mlflow": False, "register": "name"}, "needs MLflow"),
        ({"register": "a/b"}, "must not be empty or hold"),
        ({"mlflow": "yes"}, "mlflow must be 'auto'"),
        ({"inputs": torch.zeros(1)}, r"Inputs\(example="),
        ({"opset": 3}, "opset must be"),
        ({"precision": "int8"}, "precision must be one of"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        OnnxExport(**options)


def test_a_target_that_does_not_exist_is_refused_when_fitting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="target='head' is no submodule"):
        fit(tmp_path, zoo.Classifier(zoo.cnn()), OnnxExport(target="head"))


def test_a_missing_runtime_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('gone', name='onnxruntime')")
    code = "import onnxport; onnxport.OnnxExport()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'onnxport[ort]'" in result.stderr
    assert "MissingDependencyError" in result.stderr


class LeavesInEval(zoo.Classifier):
    """Ends the process in eval mode, which training itself never asks for."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise SystemExit(3)
        return super().forward(image)


def test_an_exit_of_the_module_is_a_failed_export_and_training_goes_on(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    saves = zoo.checkpoints(tmp_path)
    trainer = zoo.trainer(tmp_path, saves, callback, epochs=2)
    trainer.fit(LeavesInEval(zoo.cnn()), zoo.loader())
    assert trainer.current_epoch == 2
    assert [report.error for report in callback.reports] == ["SystemExit: 3"] * 2
