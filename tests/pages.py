"""A real run for the page of a run, and what a callback may measure besides.

Training, models, checks and files are real. Latencies, variants, placements and the validation with
the model are values of the form that a callback gives them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport import ExportReport, OnnxExport, TrackingRecord
from onnxport.page.history import HISTORY, append
from onnxport.report import (
    Attempt,
    Latency,
    MetricPair,
    MetricParity,
    Placement,
    Provenance,
    Variant,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Glyphs(pl.LightningModule):
    """Reads an image row by row: a transformer with two outputs, for images of any height."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.LayerNorm(48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.project = nn.Linear(48, 16)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(48, 10))

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.encoder(self.embed(rows)).mean(1)
        return {"logits": self.head(seen), "embedding": self.project(seen)}

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        height = 6 + index % 3  # images are cut, so that more than one height is seen
        loss = nn.functional.cross_entropy(self(batch[0][:, :height])["logits"], batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        logits = self(batch[0])["logits"]
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trained(folder: Path, epochs: int) -> list[ExportReport]:
    """Train on real images with the callback there; return its reports."""
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, val = (
        TensorDataset(images[:1200], labels[:1200]),
        TensorDataset(images[1200:], labels[1200:]),
    )
    export = OnnxExport()
    saves = ModelCheckpoint(
        folder, filename="{epoch:02d}", monitor="val_acc", mode="max", save_top_k=3
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[export, saves],
    )
    trainer.fit(Glyphs(), DataLoader(train, 64, shuffle=True), DataLoader(val, 200))
    return export.reports


def measured(reports: Sequence[ExportReport]) -> list[ExportReport]:
    """Add what a callback may measure, one failure, and one champion."""
    found = [replace(each, metrics=dict(each.metrics)) for each in reports]
    best = max(range(len(found)), key=lambda i: found[i].metrics["val_acc"])
    found[best] = _with_everything(found[best])
    found[0] = replace(
        found[0],
        attempts=(
            Attempt(core="dynamo", variant="strict", ok=False, seconds=2.4, reason=_REASON),
            *found[0].attempts,
        ),
        warnings=("'rows' was seen at 3 heights, 6 to 8: it is proven to 13, and not beyond.",),
    )
    lost = found[1]
    origin = Provenance(
        checkpoint=lost.checkpoint,
        epoch=lost.epoch,
        global_step=lost.global_step,
        metrics=lost.metrics,
    )
    found[1] = ExportReport.of_failure(
        "The worker ended by signal 9 while it proved the model; its memory had grown to 15.8 GB.",
        origin,
        "OX600",
    )
    return found


_REASON = (
    "torch.export in strict mode does not follow a data-dependent branch:\n"
    "  nets.py:31, in forward: if rows.sum() > 0:\nUse torch.where, or core='script'."
)


def _with_everything(report: ExportReport) -> ExportReport:
    batches = (1, 4, 16, 64, 256)
    ways = {CUDA: (0.42, 0.011), CPU: (0.9, 0.055), "eager": (2.4, 0.07), "compiled": (1.1, 0.052)}
    latencies = tuple(
        _latency(name, batch, fixed, each)
        for name, (fixed, each) in ways.items()
        for batch in batches
    )
    pairs = [
        MetricPair(name=name, torch=value, onnx=value + (2e-7 if "loss" in name else 0.0))
        for name, value in report.metrics.items()
        if name.startswith("val")
    ]
    parity = MetricParity(
        provider=CPU, batches=3, calls=3, metrics=tuple(pairs), ok=True, seconds=0.4
    )
    placements = (
        Placement(provider=CPU, nodes={CPU: {"MatMul": 41, "Add": 38, "Softmax": 4}}),
        Placement(
            provider=CUDA,
            nodes={
                CUDA: {"MatMul": 41, "Add": 38, "Softmax": 4},
                CPU: {"Shape": 9, "Gather": 7, "Slice": 4, "Concat": 4},
            },
        ),
    )
    record = TrackingRecord(
        uri="sqlite:///mlflow.db",
        run_id="5f1c0f7f5b0e4f0c",
        experiment_id="1",
        model_id="m-0c1e9d",
        registered_name="glyphs",
        version=7,
        alias="champion",
    )
    return replace(
        report,
        latencies=latencies,
        metric_parity=parity,
        placements=placements,
        variants=_variants(report, parity),
        tracking=record,
    )


def _latency(name: str, batch: int, fixed: float, each: float) -> Latency:
    p50 = (fixed + each * batch) * 1e-3
    return Latency(name=name, batch=batch, runs=40, p50=p50, p95=p50 * 1.3, throughput=batch / p50)


def _variants(report: ExportReport, parity: MetricParity) -> tuple[Variant, ...]:
    def less_exact(by: float) -> dict[str, Any]:
        checks = tuple(
            replace(
                check,
                outputs=tuple(
                    replace(one, max_abs_error=one.max_abs_error * by, budget=one.budget * by / 2)
                    for one in check.outputs
                ),
            )
            for check in report.checks
        )
        worse = tuple(replace(one, onnx=one.onnx - 1e-6 * by) for one in parity.metrics)
        return {"checks": checks, "metric_parity": replace(parity, metrics=worse)}

    size = report.bytes or 500_000
    half = tuple(_latency(CUDA, batch, 0.4, 0.006) for batch in (1, 16, 256))
    eight = tuple(_latency(CPU, batch, 0.7, 0.021) for batch in (1, 16, 256))
    return (
        Variant(name="fp16", ok=True, bytes=size // 2, latencies=half, **less_exact(600)),
        Variant(name="int8", ok=True, bytes=size // 3, latencies=eight, **less_exact(9000)),
        Variant(name="int8-static", ok=False, error="val_acc is 0.031 worse, 0.01 is allowed."),
    )


def write_history(folder: Path, reports: Sequence[ExportReport]) -> None:
    """Write the history of a run, as a callback does."""
    for report in reports:
        append(folder / HISTORY, report, monitor="val_acc", mode="max")
