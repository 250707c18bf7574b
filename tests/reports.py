"""Reports as values: a plain one, and one with all that a callback may measure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onnxport.report import (
    Attempt,
    Check,
    ExportReport,
    Latency,
    MetricPair,
    MetricParity,
    OutputError,
    Placement,
    Provenance,
    TrackingRecord,
    Variant,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
REPORT = ExportReport(
    ok=True,
    path="/runs/epoch=0.onnx",
    checkpoint="/runs/epoch=0.ckpt",
    global_step=10,
    metrics={"val_loss": 0.5},
    weights_sha256="ab",
    checks=(
        Check(
            provider="CPUExecutionProvider",
            sizes={"batch": 2},
            rows="real",
            reference="float64",
            outputs=(OutputError(name="output", max_abs_error=1e-7, budget=1e-5, ok=True),),
            ok=True,
        ),
    ),
)
TOLD = TrackingRecord(uri="sqlite:///m.db", registered_name="net", version=1, alias="champion")


def at(step: int, **changes: Any) -> ExportReport:
    """A report of a step."""
    place = {"path": f"/runs/{step}.onnx", "checkpoint": f"/runs/{step}.ckpt"}
    return replace(REPORT, global_step=step, **place | changes)


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
