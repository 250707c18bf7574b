"""All checkpoints of a run in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxport.page.parts import Cell, Table
from onnxport.page.run import worst_ratio
from onnxport.page.wording import (
    NOTHING,
    clipped,
    duration_text,
    error_text,
    name_of,
    number_text,
    part_text,
    size_text,
    when_text,
)

if TYPE_CHECKING:
    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport

__all__ = ["checkpoints"]

_METRICS_IN_TABLE, _MOST_ROWS = 4, 2000


def checkpoints(run: RunHistory) -> Table:
    """List all checkpoints: who leads, then the newest first."""
    metrics = run.metrics[:_METRICS_IN_TABLE]
    leading = [each for each in (run.champion, run.best) if each is not None]
    newest_first = run.events[::-1]
    order = sorted(
        newest_first, key=lambda event: all(event.report is not each for each in leading)
    )
    return Table(
        caption="All checkpoints: who leads, then the newest first",
        columns=(
            *("checkpoint", "step", "model", *(clipped(name, 30) for name in metrics)),
            *("largest error", "of budget", "size", "took", "at (UTC)"),
        ),
        rows=tuple(_row(run, event.report, event.time, metrics) for event in order[:_MOST_ROWS]),
        words=frozenset({2}),
    )


def _row(
    run: RunHistory, report: ExportReport, time: float | None, metrics: tuple[str, ...]
) -> tuple[Cell | str, ...]:
    role = run.role_of(report)
    size = run.size_of(report)
    held: Cell | str = NOTHING if size is None else size_text(size)
    if report.ok and run.is_kept(report) is False:
        held = Cell("removed", "faint")
    model = (
        Cell(role, "best") if role else Cell("proven", "ok") if report.ok else Cell("none", "bad")
    )
    return (
        name_of(report),
        NOTHING if report.global_step is None else f"{report.global_step:,}",
        model,
        *(number_text(report.metrics.get(name)) for name in metrics),
        error_text(report.max_abs_error),
        part_text(worst_ratio(report)),
        held,
        duration_text(report.seconds.get("total", sum(report.seconds.values()) or None)),
        when_text(time).removesuffix(" UTC"),
    )
