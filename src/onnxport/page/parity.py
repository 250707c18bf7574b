"""The module's own metrics, with PyTorch and with the ONNX model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxport.page.parts import Cell, Section, Table
from onnxport.page.wording import clipped, counted, name_of, number_text

if TYPE_CHECKING:
    from onnxport.page.run import RunHistory
    from onnxport.report import MetricPair

__all__ = ["parity"]


def parity(run: RunHistory) -> Section:
    """Compare the metrics of the module's own validation, PyTorch's and ONNX's."""
    shown = run.with_most("metric_parity")
    found = shown.metric_parity if shown else None
    if shown is None or found is None:
        return Section(
            name="parity",
            title="Validation with the ONNX model",
            missing="not measured; OnnxExport(validate_metrics=True) runs the module's own "
            "validation with PyTorch and with the model.",
        )
    verdict = (
        "No metric is worse than allowed." if found.ok else f"Worse than allowed: {found.reason}"
    )
    return Section(
        name="parity",
        title="Validation with the ONNX model",
        lead=f"The module's own validation of {name_of(shown)} on "
        f"{counted(found.batches, 'batch', 'batches')}, with PyTorch and with "
        f"the model in {found.provider}, which was run {counted(found.calls, 'time')}. {verdict}",
        tables=(
            Table(
                caption="Metrics with PyTorch and with ONNX",
                columns=("metric", "PyTorch", "ONNX", "difference", "verdict"),
                rows=tuple(map(_pair, found.metrics)),
                words=frozenset({4}),
                at_once=40,
            ),
        ),
    )


def _pair(pair: MetricPair) -> tuple[Cell | str, ...]:
    difference = pair.onnx - pair.torch
    text = "none" if difference == 0 else f"{difference:+.2g}"
    verdict = Cell("as PyTorch" if difference == 0 else "allowed", "ok")
    if not pair.ok:
        verdict = Cell(clipped(pair.reason, 200) or "worse", "bad")
    return (clipped(pair.name, 80), number_text(pair.torch), number_text(pair.onnx), text, verdict)
