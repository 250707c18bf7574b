"""What became of a run's checkpoints, for people at a terminal: a word meanwhile, a table after."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from onnxport._optional import is_available
from onnxport.report import known_as

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from onnxport.report import ExportReport

__all__ = ["show", "status_of", "table_of"]

HEAD = ("checkpoint", "step", "model", "max error", "seconds", "metric", "registry")
MOST_ROWS = 20
_NO_CORE = "No core produced a model that passed the proof; one that does is enough. "
"""What says the code of such a failure, too."""
_TEXT = 60
"""Characters of a reason."""


def status_of(report: ExportReport) -> str:
    """Say in a few words what became of the last checkpoint.

    Example:
        >>> from onnxport import ExportReport
        >>> status_of(ExportReport(ok=False, global_step=1200, error="No.", code="OX300"))
        'step 1200 failed [OX300]'
    """
    step = "final weights" if report.global_step is None else f"step {report.global_step}"
    if not report.ok:
        return f"{step} failed [{report.code}]"
    error = report.max_abs_error
    return f"{step} proven" if error is None else f"{step} proven {error:.1e}"


def table_of(reports: Sequence[ExportReport]) -> list[tuple[str, ...]]:
    """Return the rows of a table, below :data:`HEAD`.

    Args:
        reports: The last :data:`MOST_ROWS` of them have a row.
    """
    holders = {_alias(report): report for report in reports}  # the last one that got it has it
    return [
        _row(report, holds=holders[_alias(report)] is report) for report in reports[-MOST_ROWS:]
    ]


def _alias(report: ExportReport) -> tuple[str | None, str | None]:
    record = report.tracking
    return (None, None) if record is None else (record.registered_name, record.alias)


def _row(report: ExportReport, *, holds: bool) -> tuple[str, ...]:
    name = known_as(report.checkpoint) if report.checkpoint else "final weights"
    step = "" if report.global_step is None else str(report.global_step)
    error = report.max_abs_error
    how = f"{report.core}, refreshed" if report.how == "refresh" else str(report.core)
    reason = " ".join(str(report.error).removeprefix(_NO_CORE).split())
    short = reason if len(reason) <= _TEXT else f"{reason[: _TEXT - 3]}..."
    return (
        name,
        step,
        how if report.ok else f"none [{report.code}]: {short}",
        "" if error is None or not report.ok else f"{error:.1e}",
        f"{report.seconds.get('total', 0.0):.1f}",
        ", ".join(f"{key}={value:.4g}" for key, value in list(report.metrics.items())[:1]),
        _registry(report, holds=holds),
    )


def _registry(report: ExportReport, *, holds: bool) -> str:
    record = report.tracking
    if record is None:
        return ""
    if record.missing:
        return "not told yet"
    if record.version is None:
        return "logged"
    return f"v{record.version}{f' {record.alias}' if record.alias and holds else ''}"


def show(reports: Sequence[ExportReport], say: Callable[[str], None], dropped: int = 0) -> None:
    """Show the table: drawn on a terminal, as plain lines elsewhere.

    Args:
        reports: Of a run, in order.
        say: Tells the user lines where there is no terminal.
        dropped: So many checkpoints went before it was their turn.
    """
    gone = f"{dropped} went, or were saved again, before it was their turn" if dropped else ""
    if not reports:
        if gone:
            say(f"onnxport: no model: of the checkpoints {gone}")
        return
    rows, made = table_of(reports), sum(report.ok for report in reports)
    title = f"onnxport: {made} of {len(reports)} checkpoints have a proven model"
    more = len(reports) - len(rows)
    title += f" (the last {len(rows)})" if more else ""
    title += f"; {gone}" if gone else ""
    columns = [place for place in range(len(HEAD)) if any(row[place] for row in rows)]
    kept = [tuple(row[place] for place in columns) for row in (HEAD, *rows)]
    if sys.stdout.isatty() and is_available("rich"):
        _draw(title, kept)
    else:
        say("\n".join([title, *_aligned(kept)]))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _draw(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))  # names may hold what rich takes for markup
    Console().print(table)
