"""Smaller and faster children of a model beside it: size, speed, error, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxport.page.parts import Cell, Section, Table
from onnxport.page.run import worst_ratio
from onnxport.page.wording import (
    NOTHING,
    clipped,
    counted,
    duration_text,
    error_text,
    name_of,
    part_text,
    size_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport, Latency, MetricParity, Variant

__all__ = ["variants"]


def variants(run: RunHistory) -> Section:
    """Compare a model with its children."""
    shown = run.with_most("variants")
    if shown is None:
        return Section(
            name="variants",
            title="Variants",
            missing="none were made; OnnxExport(variants=...) makes smaller and faster ones.",
        )
    own = run.size_of(shown)
    sizes = [own, *(each.bytes for each in shown.variants)]
    most = max((size for size in sizes if size is not None), default=1) or 1
    batch = _common_batch([shown.latencies, *(each.latencies for each in shown.variants)])
    times = [
        _time_at(shown.latencies, batch),
        *(_time_at(v.latencies, batch) for v in shown.variants),
    ]
    slowest = max((time for time in times if time is not None), default=0.0)
    rows = [_row("the model itself", shown, own, most, times[0], slowest)]
    rows += [
        _row(each.name, each, each.bytes, most, time, slowest)
        for each, time in zip(shown.variants, times[1:], strict=True)
    ]
    speed = "time of a run" if batch is None else f"time at batch {batch}"
    columns = ("model", "verdict", "size", speed, "largest error", "of its budget", "metrics")
    made = sum(each.ok for each in shown.variants)
    return Section(
        name="variants",
        title="Variants",
        lead=f"{made} of {counted(len(shown.variants), 'child', 'children')} of "
        f"{name_of(shown)} proven, each against the same references, with a budget of its own.",
        tables=(
            Table(
                caption="The model and its variants",
                columns=columns,
                rows=tuple(rows),
                words=frozenset({1, 6}),
                at_once=20,
            ),
        ),
    )


def _row(
    name: str,
    one: ExportReport | Variant,
    size: int | None,
    most: int,
    time: float | None,
    slowest: float,
) -> tuple[Cell | str, ...]:
    bad = Cell(clipped(f"not made: {one.error or 'its proof failed'}", 300), "bad")
    return (
        clipped(name, 60),
        Cell("proven", "ok") if one.ok else bad,
        NOTHING if size is None else Cell(size_text(size), bar=max(0.0, min(1.0, size / most))),
        NOTHING if time is None else Cell(duration_text(time), bar=_part(time, slowest)),
        error_text(one.max_abs_error),
        part_text(worst_ratio(one)),
        _loss(one.metric_parity),
    )


def _part(value: float, most: float) -> float:
    return max(0.0, min(1.0, value / most)) if most > 0 else 0.0


def _loss(parity: MetricParity | None) -> Cell | str:
    """Say how far the first metrics are from PyTorch's."""
    if parity is None:
        return "not measured"
    texts = [f"{clipped(each.name, 30)} {each.onnx - each.torch:+.2g}" for each in parity.metrics]
    return Cell(", ".join(texts[:3]) or NOTHING, "ok" if parity.ok else "bad")


def _common_batch(measured: Sequence[Sequence[Latency]]) -> int | None:
    """Return the largest batch at which most of them were measured."""
    counts: dict[int, int] = {}
    for each in measured:
        for batch in {one.batch for one in each}:
            counts[batch] = counts.get(batch, 0) + 1
    return max(counts, key=lambda batch: (counts[batch], batch), default=None)


def _time_at(latencies: Sequence[Latency], batch: int | None) -> float | None:
    """Return the best median of a model in ONNX Runtime; PyTorch's own ways are no variants."""
    times = [
        one.p50 for one in latencies if one.batch == batch and one.name not in {"eager", "compiled"}
    ]
    return min(times, default=None)
