"""Whose file is it: models of ours follow their checkpoints, files of the user's stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from onnxport import ExportError, OnnxExport, export
from onnxport.callbacks.owed import is_owed
from onnxport.exporter.ownership import read_metadata

pytestmark = pytest.mark.integration


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))


def stems(folder: Path, suffix: str) -> list[str]:
    return sorted(
        str(path.relative_to(folder)).removesuffix(suffix) for path in folder.rglob(f"*{suffix}")
    )


class Scores(zoo.Classifier):
    """Logs prescribed values; one of the metrics has a slash in its name."""

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["image"])
        self.log("val/acc", 0.5)
        self.log("score", [1.0, 3.0, 2.0, 0.0][self.current_epoch])


def fit(root: Path, module: Any, *callbacks: Any, epochs: int = 3) -> None:
    trainer = zoo.trainer(root, *callbacks, epochs=epochs)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))


# --- the user's own files ---------------------------------------------------------------------


class WritesItsOwn(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"epoch={trainer.current_epoch}.onnx").write_text("mine")


@pytest.mark.parametrize("make", [net, zoo.PythonInside], ids=["exports", "does not export"])
def test_a_model_of_the_users_is_neither_overwritten_nor_removed(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    saves = zoo.checkpoints(tmp_path, save_top_k=1, filename="{epoch}")
    callback = OnnxExport(core="trace")
    fit(tmp_path, zoo.Classifier(make()), WritesItsOwn(folder), saves, callback)
    for epoch in range(3):
        assert (folder / f"epoch={epoch}.onnx").read_text() == "mine"
    for report in callback.reports:
        assert not report.ok
        assert "was not written by onnxport and is left alone" in str(report.error)
        assert "dirpath=" in str(report.error)


def test_a_model_that_the_user_put_in_place_of_ours_is_not_removed(tmp_path: Path) -> None:
    class Replaces(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                (tmp_path / "checkpoints" / "epoch=0.onnx").write_text("quantised by me")

    saves = zoo.checkpoints(tmp_path, save_top_k=1, filename="{epoch}")
    fit(tmp_path, zoo.Classifier(net()), Replaces(), saves, OnnxExport(core="trace"))
    assert stems(tmp_path / "checkpoints", ".onnx") == ["epoch=0", "epoch=2"]
    assert (tmp_path / "checkpoints" / "epoch=0.onnx").read_text() == "quantised by me"


def test_a_json_of_the_users_under_the_name_of_the_report_is_left_alone(tmp_path: Path) -> None:
    config = tmp_path / "voice.onnx.json"
    config.write_text('{"sample_rate": 22050}')
    with pytest.raises(ExportError, match=r"voice\.onnx\.json was not written by onnxport"):
        export(net(), torch.randn(4, 1, 8, 8), tmp_path / "voice.onnx", core="trace")
    assert config.read_text() == '{"sample_rate": 22050}'
    assert not (tmp_path / "voice.onnx").exists()


def test_export_replaces_an_older_model_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    hashes = set()
    for _ in range(2):
        export(net(), torch.randn(4, 1, 8, 8), path, core="trace")
        hashes.add(read_metadata(path)["weights_sha256"])
    assert len(hashes) == 2


# --- reports that are gone, or cannot be written ----------------------------------------------


class LosesReports(Callback):
    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for path in self.root.rglob("*.onnx.json"):
            path.unlink()


class BreaksLater(zoo.Classifier):
    broken = False

    def on_train_epoch_start(self) -> None:
        self.broken = self.current_epoch > 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        shift = json.loads(json.dumps(image.mean().item())) if self.broken else 0.0
        return super().forward(image) + shift


@pytest.mark.parametrize("collected", [False, True])
def test_models_go_with_their_checkpoints_without_their_reports(
    collected: bool, tmp_path: Path
) -> None:
    models = tmp_path / ("models" if collected else "checkpoints")
    callback = OnnxExport(core="trace", dirpath=models if collected else None)
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True, filename="{epoch}")
    fit(tmp_path, zoo.Classifier(net()), LosesReports(tmp_path), saves, callback)
    assert stems(models, ".onnx") == stems(tmp_path / "checkpoints", ".ckpt")


def test_older_weights_go_when_the_new_export_fails_without_their_report(tmp_path: Path) -> None:
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True, filename="{epoch}")
    fit(tmp_path, BreaksLater(net()), LosesReports(tmp_path), saves, OnnxExport(core="trace"))
    assert stems(tmp_path, ".onnx") == []


def test_a_report_that_cannot_be_written_is_a_failed_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxport.errors import PublishError
    from onnxport.pipeline import report_files

    def full(path: Path, text: str, check: Any) -> None:
        raise PublishError(f"Cannot write {path}: No space left on device.")

    monkeypatch.setattr(report_files, "write_text", full)
    callback = OnnxExport(core="trace")
    saves = zoo.checkpoints(tmp_path)
    zoo.trainer(tmp_path, saves, callback, epochs=1).fit(zoo.Classifier(net()), zoo.loader())
    (report,) = callback.reports
    assert not report.ok
    assert report.path is None
    assert "No space left on device" in str(report.error)
    assert report.code == PublishError.code
    assert is_owed(tmp_path / "checkpoints" / f"{Path(str(report.checkpoint)).stem}.onnx")
    assert stems(tmp_path, ".onnx") == []


# --- one folder for all models ----------------------------------------------------------------


def test_dirpath_keeps_the_folders_below_the_checkpoints_own(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", dirpath=tmp_path / "models")
    saves = zoo.checkpoints(
        tmp_path, save_top_k=2, monitor="score", mode="max", filename="{epoch}-{val/acc:.2f}"
    )
    fit(tmp_path, Scores(net()), saves, callback, epochs=4)
    found = stems(tmp_path / "checkpoints", ".ckpt")
    assert len(found) == 2
    assert stems(tmp_path / "models", ".onnx") == found
    assert stems(tmp_path / "models", ".onnx.json") == found


def test_equal_names_in_two_folders_get_two_models_and_each_goes_with_its_own(
    tmp_path: Path,
) -> None:
    first, second = (
        ModelCheckpoint(dirpath=tmp_path / name, monitor="score", mode=mode, filename="{epoch}")
        for name, mode in (("a", "max"), ("b", "min"))
    )
    callback = OnnxExport(core="trace", dirpath=tmp_path / "models")
    fit(tmp_path, Scores(net()), first, second, callback, epochs=4)
    assert stems(tmp_path, ".ckpt") == ["a/epoch=1", "b/epoch=3"]
    kept = [report for report in callback.reports if report.ok and Path(report.path).exists()]
    assert {report.checkpoint for report in kept} == {
        str(tmp_path / "a" / "epoch=1.ckpt"),
        str(tmp_path / "b" / "epoch=3.ckpt"),
    }
    assert len(stems(tmp_path / "models", ".onnx")) == 2


def test_equal_names_that_stay_get_two_models(tmp_path: Path) -> None:
    saves = [
        ModelCheckpoint(dirpath=tmp_path / name, save_top_k=-1, filename="{epoch}", monitor=monitor)
        for name, monitor in (("a", None), ("b", "score"))
    ]
    callback = OnnxExport(core="trace", dirpath=tmp_path / "models")
    fit(tmp_path, Scores(net()), *saves, callback, epochs=2)
    assert len({report.path for report in callback.reports}) == 4
    assert len(stems(tmp_path / "models", ".onnx")) == 4
    for report in callback.reports:
        beside = json.loads(Path(f"{report.path}.json").read_text())
        assert beside["checkpoint"] == report.checkpoint
