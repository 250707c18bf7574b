"""Where the time from a checkpoint to its model goes."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from onnxport.page.parts import Cell, Figure, Section, Table, axis, label, line
from onnxport.page.wording import clipped, duration_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport

__all__ = ["stages"]

_MOST_DRAWN = 120
_SUMS = ("total", "stall")
"""What is no stage of its own."""


def stages(run: RunHistory) -> Section:
    """Draw where the time from a checkpoint to its model goes."""
    timed = [report for report in run.reports if report.seconds]
    names = list(dict.fromkeys(name for each in timed for name in each.seconds))
    if not names:
        return Section(name="stages", title="Where time goes", missing="No times in the reports.")
    drawn = timed[-_MOST_DRAWN:]
    table = _stage_table(names, timed)
    figure = Figure(
        name="chart-stages",
        title="Seconds of each stage, for each checkpoint",
        summary=_stages_in_words(timed, names),
        data=_stage_traces([name for name in names if name not in _SUMS], drawn),
        layout={
            "barmode": "stack",
            "bargap": 0.25,
            "xaxis": {"type": "category", "nticks": 12, **axis("step")},
            "yaxis": axis("s", rangemode="tozero"),
        },
        height=280,
        table=table,
    )
    some = f"The last {len(drawn)} of {len(timed):,}. " if len(drawn) < len(timed) else ""
    return Section(
        name="stages",
        title="Where time goes",
        lead=f"{some}Stages run beside training, in a process of their own.",
        figures=(figure,),
    )


def _stages_in_words(timed: Sequence[ExportReport], names: Sequence[str]) -> str:
    stage = max(
        (name for name in names if name not in _SUMS),
        key=lambda name: sum(each.seconds.get(name, 0.0) for each in timed),
        default=names[0],
    )
    values = [each.seconds[stage] for each in timed if stage in each.seconds]
    return f"Most of it is {clipped(stage, 40)}: {duration_text(median(values))} in the median."


def _stage_traces(names: Sequence[str], drawn: Sequence[ExportReport]) -> list[dict[str, Any]]:
    places = [_place(report, number) for number, report in enumerate(drawn, 1)]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "name": label(clipped(name, 30)),
            "x": places,
            "y": [report.seconds.get(name, 0.0) for report in drawn],
            "marker": {"color": line(number)["color"]},
        }
        for number, name in enumerate(names)
    ]
    waiting = [_waiting(report, names) for report in drawn]
    if any(waiting):
        # Switched on by who asks for it: the first model waits for the worker's start, and beside
        # that nothing else could be seen.
        traces.append(
            {
                "type": "bar",
                "name": "waiting",
                "x": places,
                "y": waiting,
                "marker": {"color": "--faint"},
                "visible": "legendonly",
            }
        )
    return traces


def _place(report: ExportReport, number: int) -> str:
    return f"#{number}" if report.global_step is None else str(report.global_step)


def _waiting(report: ExportReport, names: Sequence[str]) -> float:
    known = sum(report.seconds.get(name, 0.0) for name in names)
    return max(0.0, report.seconds.get("total", 0.0) - known)


def _stage_table(names: Sequence[str], timed: Sequence[ExportReport]) -> Table:
    said = {"total": "in all, waiting included", "stall": "training held up"}
    values = {
        name: [each.seconds[name] for each in timed if name in each.seconds] for name in names
    }
    longest = max(median(each) for each in values.values()) or 1.0
    return Table(
        caption="Duration of each stage",
        columns=("stage", "median", "longest", "checkpoints"),
        rows=tuple(
            (
                clipped(said.get(name, name), 60),
                Cell(duration_text(median(each)), bar=_bar(median(each), longest)),
                duration_text(max(each)),
                f"{len(each):,}",
            )
            for name, each in values.items()
        ),
        at_once=40,
    )


def _bar(value: float, longest: float) -> float:
    part = value / longest
    return min(1.0, part) if part > 0 else 0.0
