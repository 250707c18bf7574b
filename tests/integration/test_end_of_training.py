"""The end of training, debugging runs, and when to export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder

from onnxport import Cadence, OnnxExport, weights_sha256
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


def names(folder: Path, suffix: str = ".onnx") -> list[str]:
    return sorted(path.name for path in folder.rglob(f"*{suffix}"))


def test_when_end_exports_only_the_best_checkpoint(tmp_path: Path) -> None:
    saves = zoo.checkpoints(tmp_path, monitor="val_loss", save_top_k=2, filename="{epoch}")
    export = OnnxExport(when="end", core="trace")
    trainer = zoo.trainer(tmp_path, saves, export, epochs=4)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    (report,) = export.reports
    assert report.checkpoint == saves.best_model_path
    assert names(tmp_path) == [report.checkpoint.rpartition("/")[2].replace(".ckpt", ".onnx")]
    assert report.metrics == {"val_loss": pytest.approx(float(saves.best_model_score))}
    content = torch.load(report.checkpoint, weights_only=False)
    assert (report.epoch, report.global_step) == (content["epoch"], content["global_step"])


def test_without_checkpointing_the_final_weights_become_a_model(tmp_path: Path) -> None:
    export = OnnxExport(core="trace")
    module = zoo.Classifier(zoo.cnn())
    zoo.trainer(tmp_path, export, enable_checkpointing=False).fit(module, zoo.loader())
    (report,) = export.reports
    assert report.checkpoint is None
    assert names(tmp_path) == ["epoch=2-step=6.onnx"]


def test_every_second_checkpoint_and_the_best_one(tmp_path: Path) -> None:
    saves = zoo.checkpoints(tmp_path, filename="{epoch}")
    export = OnnxExport(when=Cadence(every_n_checkpoints=2), core="trace")
    zoo.trainer(tmp_path, saves, export, epochs=5).fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    assert names(tmp_path) == ["epoch=0.onnx", "epoch=2.onnx", "epoch=4.onnx"]


def test_what_is_not_wanted_is_not_owed_and_has_no_older_model(tmp_path: Path) -> None:
    found: list[bool] = []

    class Looks(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            checkpoint = tmp_path / "checkpoints" / "last.ckpt"
            model = checkpoint.with_suffix(".onnx")
            if model.exists():
                state = torch.load(checkpoint, weights_only=False)["state_dict"]
                found.append(read_metadata(model)["weights_sha256"] == weights_sha256(state))

    saves = zoo.checkpoints(tmp_path, filename="{epoch}", save_last=True)
    export = OnnxExport(when=Cadence(every_n_checkpoints=3), core="trace")
    trainer = zoo.trainer(tmp_path, saves, export, Looks(), epochs=7)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    assert found
    assert all(found)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name[0] == "."]


def test_should_export_can_be_overridden(tmp_path: Path) -> None:
    class Late(OnnxExport):
        def should_export(self, trainer: Any, checkpoint: str) -> bool:
            return trainer.current_epoch >= 2

    saves = zoo.checkpoints(tmp_path, filename="{epoch}")
    export = Late(core="trace")
    zoo.trainer(tmp_path, saves, export, epochs=4).fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    assert names(tmp_path) == ["epoch=2.onnx", "epoch=3.onnx"]


def test_fast_dev_run_proves_that_it_exports_and_leaves_nothing(tmp_path: Path) -> None:
    export = OnnxExport(core="trace", mlflow=True)
    trainer = zoo.trainer(tmp_path, export, fast_dev_run=2)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    (report,) = export.reports
    assert report.ok
    assert report.path is None
    assert report.checks
    assert names(tmp_path) == names(tmp_path, ".json") == names(tmp_path, ".db") == []


def test_sanity_checking_exports_nothing(tmp_path: Path) -> None:
    class Watch(OnnxExport):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert self.reports == []
            assert trainer.num_sanity_val_steps == 2

    export = Watch(core="trace")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), export, epochs=1)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    assert len(export.reports) == 1


def test_checkpoints_that_the_tuner_writes_for_itself_are_left_alone(tmp_path: Path) -> None:
    class Tunable(zoo.Classifier):
        lr = 1e-3

    finder = LearningRateFinder(num_training_steps=5)
    export = OnnxExport(core="trace")
    trainer = zoo.trainer(tmp_path, finder, zoo.checkpoints(tmp_path), export, epochs=1)
    trainer.fit(Tunable(zoo.cnn()), zoo.loader())
    assert [report.ok for report in export.reports] == [True]
    assert not [name for name in names(tmp_path) if "lr_find" in name]


def test_a_resumed_run_goes_on_and_mirrors_what_it_removes(tmp_path: Path) -> None:
    def fit(epochs: int, resume: str | None) -> OnnxExport:
        saves = zoo.checkpoints(tmp_path, save_top_k=1, filename="{epoch}", monitor="val_loss")
        export = OnnxExport(core="trace")
        trainer = zoo.trainer(tmp_path, saves, export, epochs=epochs)
        module = zoo.Classifier(zoo.cnn())
        trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False), ckpt_path=resume)
        return export

    first = fit(1, None)
    fit(3, first.reports[0].checkpoint)
    stems = [name.removesuffix(".ckpt") for name in names(tmp_path, ".ckpt")]
    assert [name.removesuffix(".onnx") for name in names(tmp_path)] == stems
    assert "epoch=1" not in stems


def test_a_run_resumed_in_another_folder_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    def fit(root: Path, epochs: int, **options: Any) -> OnnxExport:
        saves = zoo.checkpoints(
            root, save_top_k=1, save_last=True, monitor="val_loss", filename="{epoch}"
        )
        export = OnnxExport(core="trace")
        trainer = zoo.trainer(root, saves, export, epochs=epochs)
        module = zoo.Classifier(zoo.cnn())
        trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False), **options)
        return export

    fit(tmp_path / "first", 2)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")}
    with pytest.warns(UserWarning, match="dirpath has changed"):
        export = fit(tmp_path / "second", 4, ckpt_path=tmp_path / "first/checkpoints/last.ckpt")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")} == first
    assert all(report.ok for report in export.reports)
    models = names(tmp_path / "second")
    assert models == [
        name.replace(".ckpt", ".onnx") for name in names(tmp_path / "second", ".ckpt")
    ]
    assert "last.onnx" in models


def test_one_callback_serves_two_fits(tmp_path: Path) -> None:
    export = OnnxExport(core="trace")
    module = zoo.Classifier(zoo.cnn())
    for run in ("a", "b"):
        trainer = zoo.trainer(tmp_path / run, zoo.checkpoints(tmp_path / run), export, epochs=1)
        trainer.fit(module, zoo.loader())
    assert [report.ok for report in export.reports] == [True, True]
    assert len(names(tmp_path)) == 2


def test_early_stopping_still_ends_with_a_model(tmp_path: Path) -> None:
    export = OnnxExport(core="trace")
    stop = EarlyStopping("val_loss", patience=1, min_delta=100)
    trainer = zoo.trainer(tmp_path, stop, zoo.checkpoints(tmp_path), export, epochs=9)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    assert trainer.current_epoch == 2
    assert [report.ok for report in export.reports] == [True, True]


def test_hooks_are_gone_when_training_ends(tmp_path: Path) -> None:
    module = zoo.Classifier(zoo.cnn())
    zoo.trainer(tmp_path, OnnxExport(core="trace"), epochs=1).fit(module, zoo.loader())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in module.modules())
