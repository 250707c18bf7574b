"""Which checkpoint is the best, by which metric, and of which weights that metric is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient

from onnxport import MLflow, OnnxExport

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SCORES = (0.2, 0.9, 0.3, 0.1)


class Scored(zoo.Classifier):
    """Logs a prescribed metric in each validation; an epoch has three steps."""

    def __init__(self) -> None:
        super().__init__(zoo.cnn())

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["image"])
        self.log("acc", SCORES[self.current_epoch])


def by_step(root: Path, every: int, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=root / "steps", every_n_train_steps=every, filename="{step}", **options
    )


def by_score(root: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=root / "best", monitor="acc", mode="max", filename="{epoch}", **options
    )


def fit(root: Path, store: str, callback: OnnxExport, *saves: ModelCheckpoint) -> pl.Trainer:
    logger = MLFlowLogger("e", tracking_uri=store, artifact_location=(root / "art").as_uri())
    trainer = zoo.trainer(root, *saves, callback, epochs=4, logger=logger)
    trainer.fit(Scored(), zoo.loader(), zoo.loader(shuffle=False))
    return trainer


def champion(store: str) -> tuple[str, float]:
    tags = MlflowClient(store).get_model_version_by_alias("n", "champion").tags
    return tags["onnxport.checkpoint"], float(tags["onnxport.metric.value"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: OnnxExport(core="trace", register="n"),
        lambda: OnnxExport(core="trace", register="n", when="end"),
        lambda: OnnxExport(core="trace", mlflow=MLflow(register="n", policy="end")),
    ],
    ids=["each checkpoint", "when end", "policy end"],
)
@pytest.mark.parametrize("every", [2, 3])
def test_the_callback_with_a_monitor_decides(
    every: int, make: Callable[[], OnnxExport], store: str, tmp_path: Path
) -> None:
    callback = make()
    fit(tmp_path, store, callback, by_step(tmp_path, every), by_score(tmp_path))
    name, value = champion(store)
    assert (name, value) == ("epoch=1.ckpt", pytest.approx(0.9))


def test_a_checkpoint_between_validations_has_no_metric_of_other_weights(
    store: str, tmp_path: Path
) -> None:
    callback = OnnxExport(core="trace", register="n")
    saves = by_step(tmp_path, 2, save_top_k=-1), by_score(tmp_path, every_n_epochs=4)
    fit(tmp_path, store, callback, *saves)
    for report in callback.reports:
        measured = Path(str(report.checkpoint)).parent.name == "best"
        assert report.metrics == ({"acc": pytest.approx(0.1)} if measured else {})
    assert champion(store) == ("epoch=3.ckpt", pytest.approx(0.1))


def test_a_best_checkpoint_that_was_chosen_by_a_stale_metric_has_no_score(
    store: str, tmp_path: Path
) -> None:
    callback = OnnxExport(core="trace", register="n", when="end")
    stale = by_step(tmp_path, 3, monitor="acc", mode="max")
    trainer = fit(tmp_path, store, callback, stale)
    (report,) = callback.reports
    assert report.checkpoint == stale.best_model_path
    # Saved after 9 steps, just before the third validation: what was known then is of 6 steps.
    assert (report.global_step, float(stale.best_model_score)) == (9, pytest.approx(0.9))
    assert report.metrics == {"acc": pytest.approx(0.3)}
    assert trainer.global_step == 12


def test_without_a_monitor_the_newest_model_is_the_best(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", register="n")
    fit(tmp_path, store, callback, by_step(tmp_path, 5, save_top_k=-1))
    assert champion(store)[0] == "step=10.ckpt"
