"""Smaller children of a model: made, proven, mirrored and tracked with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import mlflow
import mlflow.onnx
import onnx
import onnxruntime
import pytest
import torch
import zoo
from mlflow import MlflowClient
from torch import nn

from onnxport import ConfigurationError, Metrics, MLflow, OnnxExport, export
from onnxport.config import ExportOptions
from onnxport.exporter.ownership import read_metadata
from onnxport.exporter.writer import variant_files, variant_path

if TYPE_CHECKING:
    from onnxport import ExportReport

pytestmark = pytest.mark.integration

ALL = ("fp16", "int8", "int8-static")


class Wide(pl.LightningModule):
    """Large enough for its weights to be most of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 36, 64),
            nn.GELU(),
            nn.Linear(64, 3),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch["image"]), batch["label"])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch["image"]), batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def made(
    root: Path, variants: Any = ALL, module: pl.LightningModule | None = None, **options: Any
) -> list[ExportReport]:
    settings = {"mlflow": False, "background": False, "core": "trace"} | options
    keeps = settings.pop("keeps", {})
    epochs = settings.pop("epochs", 2)
    export = OnnxExport(variants=variants, **settings)
    torch.manual_seed(0)
    trainer = zoo.trainer(root, export, zoo.checkpoints(root, **keeps), epochs=epochs)
    trainer.fit(Wide() if module is None else module, zoo.loader(), zoo.loader(8, shuffle=False))
    assert all(report.ok for report in export.reports)
    return export.reports


def test_each_is_proven_smaller_and_of_the_same_checkpoint(tmp_path: Path) -> None:
    reports = made(tmp_path)
    assert len(reports) == 2
    for report in reports:
        assert report.path is not None
        assert [(each.name, each.ok, each.error) for each in report.variants] == [
            (name, True, None) for name in ALL
        ]
        size = Path(report.path).stat().st_size
        for each in report.variants:
            assert each.path is not None
            assert each.bytes is not None
            assert each.bytes < 0.65 * size
            assert all(check.ok for check in each.checks)
            assert {check.sizes["batch"] for check in each.checks} > {1}
            assert {one.name for one in each.latencies} == {"CPUExecutionProvider", "parent"}
            known = read_metadata(Path(each.path))
            assert known["variant"] == each.name
            assert known["weights_sha256"] == report.weights_sha256
            onnx.checker.check_model(each.path)
            session = onnxruntime.InferenceSession(each.path)
            image = torch.rand(11, 1, 8, 8)
            [found] = session.run(None, {"image": image.numpy()})
            [parent] = onnxruntime.InferenceSession(report.path).run(None, {"image": image.numpy()})
            assert abs(found - parent).max() < 0.2 * abs(parent).max()
            assert abs(found - parent).max() > 0  # it is another model


def test_they_go_with_their_checkpoint(tmp_path: Path) -> None:
    made(tmp_path, ("fp16",), keeps={"save_top_k": 1})
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {
        "epoch=1-step=6.ckpt",
        "epoch=1-step=6.onnx",
        "epoch=1-step=6.onnx.json",
        "epoch=1-step=6.fp16.onnx",
    }


def test_a_model_of_another_checkpoint_is_no_variant(tmp_path: Path) -> None:
    [report, *_] = made(tmp_path, (), epochs=1, keeps={"filename": "a.fp16"})
    path = Path(str(report.path))
    assert path.name == "a.fp16.onnx"
    assert path == variant_path(path.with_name("a.onnx"), "fp16")
    assert variant_files(path.with_name("a.onnx")) == []


def test_what_is_too_far_off_is_not_there(tmp_path: Path) -> None:
    reports = made(tmp_path, {"fp16": 1e-9, "int8": 0.5})
    for report in reports:
        half, whole = report.variants
        assert (half.ok, half.path) == (False, None)
        assert "allowed is" in str(half.error)
        assert whole.ok
        assert any("no fp16 variant" in text for text in report.warnings)
        assert report.ok
    assert not list(tmp_path.rglob("*.fp16.onnx"))


def test_a_new_model_has_no_children_of_an_older_one(tmp_path: Path) -> None:
    path, net = tmp_path / "net.onnx", nn.Linear(64, 8)
    for variants, left in ((("int8", "fp16"), 3), ({"int8": 1e-9}, 1), (("fp16",), 2), ((), 1)):
        export(net, torch.randn(8, 64), path, core="trace", variants=variants)
        assert len(list(tmp_path.glob("*.onnx"))) == left


def test_their_metrics_decide_too(tmp_path: Path) -> None:
    strict = Metrics(max_degradation=1e-4)
    [report, *_] = made(tmp_path, ("fp16", "int8"), validate_metrics=strict, epochs=1)
    parity = [each.metric_parity for each in report.variants]
    assert report.metric_parity is not None
    assert report.metric_parity.ok
    assert all(each is not None and each.calls > 0 for each in parity)
    [_, whole] = report.variants
    assert not whole.ok
    assert "The module's own validation: val_loss differs by" in str(whole.error)


def test_each_is_a_logged_model_of_its_own(store: str, tmp_path: Path) -> None:
    reports = made(
        tmp_path,
        ("fp16", "int8"),
        mlflow=MLflow(tracking_uri=store, register="wide"),
        keeps={"save_top_k": 1},
    )
    mlflow.set_tracking_uri(store)
    client = MlflowClient(store)
    [last] = [report for report in reports if report.tracking and report.tracking.model_id][-1:]
    assert last.tracking is not None
    logged = client.search_logged_models([str(last.tracking.experiment_id)])
    by_variant = {each.tags.get("onnxport.variant", ""): each for each in logged}
    # Of the first checkpoint, which was removed, nothing is left but what has a version.
    ours = [each for each in logged if each.tags.get("onnxport.parent") == last.tracking.model_id]
    assert {each.tags["onnxport.variant"] for each in ours} == {"fp16", "int8"}
    assert set(by_variant) == {"", "fp16", "int8"}
    assert {each.model_id for each in ours} == {each.model_id for each in last.variants}
    for each in ours:
        metrics = {metric.key: metric.value for metric in each.metrics}
        name = each.tags["onnxport.variant"]
        assert metrics[f"onnx/{name}/max_abs_err"] > 0
        assert "onnx/max_abs_err" not in metrics
        loaded = mlflow.onnx.load_model(f"models:/{each.model_id}")
        onnx.checker.check_model(loaded)


def test_training_is_what_it_is_without(tmp_path: Path) -> None:
    weights = []
    for variants in ((), ALL):
        module = Wide()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.1)
        made(tmp_path / str(len(variants)), variants, module)
        weights.append([*(p.detach().clone() for p in module.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("wrong", ["fp16", ("fp8",), {"int8": 0}, {"int8": "little"}])
def test_what_is_no_variant_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="variants"):
        ExportOptions.of(
            core="auto", inputs=None, opset=None, precision=None, verify=True, variants=wrong
        )
