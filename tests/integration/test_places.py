"""Where models go: several callbacks, links to checkpoints, runs without any checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from onnxport import ConfigurationError, OnnxExport

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))


def names(folder: Path, suffix: str = ".onnx") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{suffix}"))


def fit(root: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> zoo.Classifier:
    module = zoo.Classifier(net())
    trainer = zoo.trainer(root, *callbacks, epochs=epochs, **options)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return module


# --- several callbacks ------------------------------------------------------------------------


def test_two_callbacks_with_two_folders_both_get_every_checkpoint(tmp_path: Path) -> None:
    whole = OnnxExport(core="trace", dirpath=tmp_path / "whole")
    part = OnnxExport(core="trace", dirpath=tmp_path / "part", target="net.1")
    saves = zoo.checkpoints(tmp_path, save_top_k=1, monitor="val_loss", filename="{epoch}")
    fit(tmp_path, saves, whole, part, epochs=3)
    stems = [name.removesuffix(".ckpt") for name in names(tmp_path / "checkpoints", ".ckpt")]
    for folder in ("whole", "part"):
        assert [n.removesuffix(".onnx") for n in names(tmp_path / folder)] == stems
    assert {report.target for report in part.reports} == {"net.1"}


def test_two_targets_in_one_folder_have_two_names(tmp_path: Path) -> None:
    saves = zoo.checkpoints(tmp_path, save_top_k=1, filename="{epoch}", monitor="val_loss")
    whole, part = OnnxExport(core="trace"), OnnxExport(core="trace", target="net.1")
    fit(tmp_path, saves, part, whole, epochs=3)
    (checkpoint,) = names(tmp_path, ".ckpt")
    stem = checkpoint.removesuffix(".ckpt")
    assert names(tmp_path) == sorted([f"{stem}-net.1.onnx", f"{stem}.onnx"])
    assert names(tmp_path, ".json") == sorted([f"{stem}-net.1.onnx.json", f"{stem}.onnx.json"])


def test_a_callback_that_would_overwrite_anothers_models_says_so_and_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = OnnxExport(core="trace"), OnnxExport(core="script")
    fit(tmp_path, zoo.checkpoints(tmp_path), first, second)
    assert [report.ok for report in first.reports] == [True, True]
    (report,) = second.reports
    assert "Give them another dirpath= or another target=" in report.error
    assert report.error in caplog.text


def test_it_is_refused_before_training_where_errors_are_raised(tmp_path: Path) -> None:
    first, second = OnnxExport(core="trace"), OnnxExport(core="script", on_error="raise")
    with pytest.raises(ConfigurationError, match="would write the same files"):
        fit(tmp_path, zoo.checkpoints(tmp_path), first, second)
    assert names(tmp_path, ".ckpt") == []


# --- links ------------------------------------------------------------------------------------


class Looks(Callback):
    """Compares models with checkpoints at the start of each epoch but the first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.looks = folder, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch:
            self.looks += 1
            assert_mirrored(self.folder)


def assert_mirrored(folder: Path) -> None:
    stems = [name.removesuffix(".ckpt") for name in names(folder, ".ckpt")]
    assert [name.removesuffix(".onnx") for name in names(folder)] == stems
    assert [name.removesuffix(".onnx.json") for name in names(folder, ".json")] == stems


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links allowed"])
def test_a_link_to_the_last_checkpoint_has_a_link_to_its_model(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("a required privilege is not held by the client")

        monkeypatch.setattr("os.symlink", refuse)
    folder = tmp_path / "checkpoints"
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last="link", filename="{epoch}")
    looks = Looks(folder)
    module = fit(tmp_path, saves, looks, OnnxExport(core="trace"), epochs=3)
    assert looks.looks == 6
    assert_mirrored(folder)
    assert (folder / "last.onnx").is_symlink() == links
    image = torch.randn(5, 1, 8, 8)
    given = onnxruntime.InferenceSession(folder / "last.onnx").run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.as_tensor(given[0]), module.eval()(image).detach())


def test_a_link_that_is_removed_takes_its_link_along(tmp_path: Path) -> None:
    saves = zoo.checkpoints(tmp_path, save_top_k=2, save_last="link", monitor="val_loss")
    saves.CHECKPOINT_NAME_LAST = "{epoch}-last"
    fit(tmp_path, saves, OnnxExport(core="trace"), epochs=3)
    assert len([name for name in names(tmp_path) if "last" in name]) == 1
    assert_mirrored(tmp_path / "checkpoints")


def test_a_file_of_the_users_is_not_replaced_by_a_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.onnx").write_text("mine")
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last="link")
    fit(tmp_path, saves, OnnxExport(core="trace"))
    assert (folder / "last.onnx").read_text() == "mine"
    assert "was not written by onnxport and is left alone" in caplog.text


# --- no checkpoint ----------------------------------------------------------------------------


class SavesByHand(Callback):
    """Saves with the trainer, which no checkpoint callback knows of."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize(
    ("callback", "when"),
    [
        (ModelCheckpoint(save_top_k=0), "checkpoint"),
        (ModelCheckpoint(every_n_epochs=9), "checkpoint"),
        (ModelCheckpoint(save_top_k=0), "end"),
        (SavesByHand(), "end"),
    ],
    ids=["keeps none", "never due", "keeps none, end", "by hand"],
)
def test_where_no_checkpoint_became_a_model_the_final_weights_do(
    callback: Callback, when: Any, tmp_path: Path
) -> None:
    export = OnnxExport(core="trace", when=when)
    options = {"enable_checkpointing": isinstance(callback, ModelCheckpoint)}
    module = fit(tmp_path, callback, export, **options)
    (report,) = export.reports
    assert report.ok
    assert names(tmp_path) == ["epoch=2-step=6.onnx"]
    image = torch.randn(5, 1, 8, 8)
    given = onnxruntime.InferenceSession(report.path).run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.as_tensor(given[0]), module.eval()(image).detach())
