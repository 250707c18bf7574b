"""The module's own validation with the model in its place, in real training runs."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
import zoo
from lightning.pytorch.loggers import CSVLogger
from mlflow import MlflowClient
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport import Background, Metrics, MLflow, OnnxExport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from onnxport import ExportReport

pytestmark = pytest.mark.integration


class Named(TensorDataset):
    """Batches with names, and one thing that is no tensor."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "name": f"row {index}"}


class Measured(pl.LightningModule):
    """Metrics of all kinds, a structured result, and noise in the step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10)
        self.confusion = torchmetrics.classification.MulticlassConfusionMatrix(10)
        self.losses: list[float] = []

    def forward(self, image: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        logits = self.head(self.net(image)) * scale
        return {"logits": logits, "best": logits.argmax(1)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch["image"])["logits"], batch["label"])
        self.losses.append(loss.item())
        self.log("train_loss", loss, batch_size=len(batch["image"]))
        return loss

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        result = self(image=batch["image"])  # by name, and by position in training
        assert len(batch["name"]) == len(batch["image"])
        noise, rows = torch.rand(()), len(batch["image"])
        self.accuracy(result["logits"], batch["label"])
        self.log("val_acc", self.accuracy, batch_size=rows)
        loss = nn.functional.cross_entropy(result["logits"], batch["label"])
        self.log("val_loss", loss, batch_size=rows)
        self.log("noise", noise, batch_size=rows)
        self.confusion.update(result["best"], batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.log("diagonal", self.confusion.compute().diag().float().sum())
        self.confusion.reset()
        if self.logger is not None:
            self.logger.experiment.log_metrics({"by_hand": 1.0}, step=0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def loaders() -> tuple[DataLoader, list[DataLoader]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(90, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (90,), generator=generator)
    train, first, second = (
        Named(images[place], labels[place])
        for place in (slice(0, 48), slice(48, 77), slice(77, 90))
    )
    return DataLoader(train, 16), [DataLoader(first, 16), DataLoader(second, 5)]


def fit(
    module: pl.LightningModule, export: OnnxExport | None, root: Path, **options: Any
) -> pl.Trainer:
    torch.manual_seed(0)
    keeps_all = zoo.checkpoints(root)
    trainer = zoo.trainer(root, keeps_all, *([] if export is None else [export]), **options)
    trainer.fit(module, *loaders())
    return trainer


def made(
    module: pl.LightningModule, root: Path, validate_metrics: Any = True, **options: Any
) -> list[ExportReport]:
    epochs = options.pop("epochs", 1)
    options = {"background": False, "mlflow": False, "core": "trace"} | options
    export = OnnxExport(validate_metrics=validate_metrics, **options)
    fit(module, export, root, epochs=epochs)
    assert all(report.ok for report in export.reports), export.reports
    return export.reports


@pytest.mark.parametrize("background", [False, Background()])
def test_the_same_metrics_come_out(tmp_path: Path, background: bool | Background) -> None:
    reports = made(Measured(), tmp_path, epochs=2, background=background)
    assert len(reports) >= 2
    for report in reports[:2]:
        parity = report.metric_parity
        assert parity is not None
        assert parity.ok, parity.reason
        assert (parity.batches, parity.calls) == (2 + 3, 2 + 3)
        by_name = {pair.name: pair for pair in parity.metrics}
        assert set(by_name) >= {
            "val_acc/dataloader_idx_0",
            "val_acc/dataloader_idx_1",
            "val_loss/dataloader_idx_0",
            "val_loss/dataloader_idx_1",
            "noise/dataloader_idx_0",
            "diagonal",
        }
        # What training itself has measured with these weights.
        for name, pair in by_name.items():
            if "noise" not in name:
                assert pair.torch == pytest.approx(report.metrics[name], rel=1e-5)
                assert pair.onnx == pytest.approx(pair.torch, rel=1e-5)
        assert by_name["noise/dataloader_idx_0"].torch == by_name["noise/dataloader_idx_0"].onnx


def test_training_and_its_logs_are_what_they_are_without(tmp_path: Path) -> None:
    runs: list[tuple[Any, ...]] = []
    export = OnnxExport(validate_metrics=True, background=False, mlflow=False, core="trace")
    for each in (None, export):
        torch.manual_seed(1)
        module, root = Measured(), tmp_path / str(each is None)
        trainer = fit(module, each, root, epochs=2, logger=CSVLogger(str(root), version=0))
        logged = (root / "lightning_logs/version_0/metrics.csv").read_text()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        runs.append((module.losses, logged, metrics, torch.rand(3).tolist()))
        assert int(module.accuracy._update_count) == 0
    assert runs[0] == runs[1]


def test_so_many_batches_of_each_loader_and_not_at_each_checkpoint(tmp_path: Path) -> None:
    options = Metrics(batches=1, every_n_checkpoints=2)
    reports = made(Measured(), tmp_path, options, epochs=3)
    assert [None if r.metric_parity is None else r.metric_parity.batches for r in reports[:3]] == [
        2,
        None,
        2,
    ]


class Submodule(Measured):
    """The step calls a part, and not forward."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(self.net, self.head)

    def forward(self, image: torch.Tensor, scale: float = 1.0) -> Any:
        logits = self.whole(image)
        return {"logits": logits, "best": logits.argmax(1)}


def test_a_submodule_is_replaced_where_it_stands(tmp_path: Path) -> None:
    [report, *_] = made(Submodule(), tmp_path, target="whole")
    parity = report.metric_parity
    assert parity is not None
    assert parity.ok, parity.reason
    assert parity.calls == 5


class Hooked(Measured):
    """A hook changes the result, and is in the model already."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_hook(lambda _, __, out: 2 * out)


def test_hooks_do_not_run_twice(tmp_path: Path) -> None:
    [report, *_] = made(Hooked(), tmp_path, target="head")
    parity = report.metric_parity
    assert parity is not None
    assert parity.ok, parity.reason


class ManyLogits(Measured):
    """What is logged shows the last bit."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch["image"])["logits"].double()
        self.log("val_bits", 1e9 * (logits - logits.round(decimals=2)).sum(), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log nothing else."""


def test_a_model_that_is_worse_never_gets_the_alias(store: str, tmp_path: Path) -> None:
    mlflow = MLflow(tracking_uri=store, register="digits", policy="all")
    strict = Metrics(max_degradation=1e-12)
    reports = made(ManyLogits(), tmp_path, strict, mlflow=mlflow)
    parity = reports[0].metric_parity
    assert parity is not None
    assert not parity.ok
    assert "val_bits/dataloader_idx_0 differs by" in parity.reason
    assert any("does not speak for the model" in text for text in reports[0].warnings)
    client = MlflowClient(store)
    registered = client.get_registered_model("digits")
    assert registered.aliases == {}
    [version, *_] = client.search_model_versions("name='digits'")
    assert version.tags["onnxport.metric.barred"] == parity.reason
    made(Measured(), tmp_path / "other", mlflow=mlflow)
    assert "champion" in client.get_registered_model("digits").aliases


def test_what_the_model_measures_is_in_mlflow(store: str, tmp_path: Path) -> None:
    [report, *_] = made(Measured(), tmp_path, mlflow=MLflow(tracking_uri=store))
    assert report.tracking is not None
    assert report.metric_parity is not None
    logged = MlflowClient(store).get_logged_model(report.tracking.model_id)
    values = {metric.key: metric.value for metric in logged.metrics}
    [pair] = [one for one in report.metric_parity.metrics if one.name == "diagonal"]
    assert values["onnx/diagonal"] == pytest.approx(pair.onnx)


class OfTraining(Measured):
    """Asks for what only training has."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        assert self.trainer.state.fn == "fit"


class Silent(Measured):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch["image"])

    def on_validation_epoch_end(self) -> None:
        """Log nothing."""


class Elsewhere(Measured):
    """The validation goes around what is exported."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_mean", self.net(batch["image"]).mean(), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log nothing."""


class OtherCalls(Measured):
    """Validation gives the model more than training does."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        scale = torch.ones(()) if batch_idx else 1.0
        self.log("val_mean", self(batch["image"], scale)["logits"].mean(), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log nothing else."""


def wrapped(module: nn.Module) -> Callable[..., Any]:
    return lambda image: module(image)["logits"].softmax(1)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (OfTraining, {}, "It cannot be repeated: AssertionError"),
        (Silent, {}, "logs nothing"),
        (Elsewhere, {}, "never runs what was exported"),
        (OtherCalls, {}, "It fails with the model: VerificationError"),
        (Measured, {"target": wrapped}, "is not what its validation runs"),
    ],
)
def test_what_says_nothing_of_the_model_is_said(
    tmp_path: Path, kind: type[Measured], options: dict[str, Any], reason: str
) -> None:
    [report, *_] = made(kind(), tmp_path, **options)
    parity = report.metric_parity
    assert parity is not None
    assert not parity.ok
    assert reason in parity.reason
    assert report.ok  # proven on its outputs


class Deadly(Measured):
    """Ends the process in which it is validated again."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer_process = os.getpid()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if os.getpid() != self.trainer_process:
            os._exit(3)
        super().validation_step(batch, batch_idx, dataloader_idx)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_validation_that_ends_the_worker_costs_no_model(tmp_path: Path) -> None:
    [report, *_] = made(Deadly(), tmp_path, background=Background())
    parity = report.metric_parity
    assert report.ok
    assert parity is not None
    assert parity.reason == "It has ended the worker process, and was not tried again."


def test_batches_that_cannot_be_kept_are_said(tmp_path: Path) -> None:
    class Unkept(Measured):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch | {"lock": threading.Lock()}

    [report, *_] = made(Unkept(), tmp_path)
    assert report.metric_parity is not None
    assert "batches cannot be kept" in report.metric_parity.reason


def test_before_the_first_validation_there_is_nothing_to_compare(tmp_path: Path) -> None:
    callback = zoo.checkpoints(tmp_path, every_n_train_steps=1, save_top_k=-1)
    export = OnnxExport(validate_metrics=True, background=False, mlflow=False, core="trace")
    torch.manual_seed(0)
    trainer = zoo.trainer(tmp_path, export, callback, epochs=1)
    trainer.fit(Measured(), *loaders())
    assert export.reports[0].metric_parity is None


def test_the_other_lightning_validates_its_own_modules(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class OfTheOther(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self(batch[0]).square().mean()

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self(batch[0]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    export = OnnxExport(validate_metrics=True, background=False, mlflow=False, core="trace")
    data = DataLoader(TensorDataset(torch.randn(12, 4)), 4)
    trainer = other.Trainer(
        max_epochs=1,
        logger=False,
        callbacks=[export, other.callbacks.ModelCheckpoint(tmp_path)],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(OfTheOther(), data, data)
    (report,) = export.reports
    assert report.metric_parity is not None
    assert [metric.name for metric in report.metric_parity.metrics] == ["val_loss"]
    assert report.metric_parity.ok
