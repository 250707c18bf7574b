"""The run at a glance: the head of the page, metrics and errors over training, all checkpoints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from onnxport.page.parts import Cell, Fact, Figure, Section, Table, axis, label, line
from onnxport.page.run import RunHistory, worst_ratio
from onnxport.page.wording import (
    NOTHING,
    clipped,
    counted,
    duration_text,
    error_text,
    name_of,
    number_text,
    part_text,
    size_text,
    when_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.report import ExportReport

__all__ = ["checkpoints", "head", "timeline"]

_METRICS_DRAWN, _METRICS_IN_TABLE = 8, 4
_MOST_ROWS = 2000
_SAME_SCALE = 5.0


def head(run: RunHistory) -> tuple[Fact, ...]:
    """Say in a few numbers how a run went."""
    ratios = (worst_ratio(report) for report in run.proven)
    worst = max((ratio for ratio in ratios if ratio is not None), default=None)
    checks = sum(len(report.checks) for report in run.reports)
    totals = sorted(each.seconds["total"] for each in run.proven if "total" in each.seconds)
    stalls = [each.seconds["stall"] for each in run.reports if "stall" in each.seconds]
    facts = [
        Fact(
            name="Proven models",
            text=f"{len(run.proven):,} of {len(run.reports):,}",
            more=counted(len(run.failed), "failure") if run.failed else "no failure",
            mark="some" if run.failed else "ok",
        ),
        _leader(run),
        Fact(
            name="Largest error",
            text=part_text(worst),
            more=f"of its budget, in {counted(checks, 'run')} of ONNX Runtime",
        ),
    ]
    if totals:
        stalled = f"training was held up for {duration_text(sum(stalls))} in all"
        text = duration_text(totals[len(totals) // 2])
        facts.append(
            Fact(name="From checkpoint to model", text=text, more=stalled if stalls else "median")
        )
    return tuple(facts)


def _leader(run: RunHistory) -> Fact:
    shown = run.shown
    if shown is None:
        return Fact(name="Best model", text=NOTHING, more="no checkpoint has a model", mark="bad")
    name = clipped(name_of(shown), 40)
    if run.monitor and run.monitor[0] in shown.metrics:
        name = f"{run.monitor[0]} {number_text(shown.metrics[run.monitor[0]])}"
    if run.champion:
        of = shown.tracking and shown.tracking.registered_name
        version = shown.tracking and shown.tracking.version
        return Fact(name="Champion", text=name, more=f"version {version} of {of}", mark="best")
    if run.best:
        return Fact(name="Best model", text=name, more=name_of(shown), mark="best")
    return Fact(name="Last model", text=name, more="no metric is watched: the last one is shown")


def timeline(run: RunHistory) -> Section:
    """Draw metrics and the largest error over training."""
    steps = _steps(run.reports)
    data = [*_metric_traces(run, steps), *_leaders(run, steps), *_error_traces(run, steps)]
    layout = {
        "xaxis": axis("step" if _have_steps(run.reports) else "checkpoint", anchor="y2"),
        "yaxis": axis("metric", domain=[0.46, 1]),
        "yaxis2": axis("largest error", domain=[0, 0.4], type="log", exponentformat="power"),
    }
    figure = Figure(
        name="chart-timeline",
        title="Metrics, and the largest error of each model",
        summary=_timeline_in_words(run),
        data=data,
        layout=layout,
        height=460,
    )
    return Section(
        name="timeline",
        title="Training and proofs",
        lead="Every checkpoint, in the order of training. A model is proven if each output stays "
        "within its error budget in every run.",
        figures=(figure,),
        tables=(checkpoints(run),),
    )


def _timeline_in_words(run: RunHistory) -> str:
    text = f"{len(run.proven):,} of {counted(len(run.reports), 'checkpoint')} proven."
    errors = [each.max_abs_error for each in run.proven if each.max_abs_error is not None]
    if errors:
        low, high = error_text(min(errors)), error_text(max(errors))
        text += f" The largest error of a model is between {low} and {high}."
    for name in run.metrics[:1]:
        values = [each.metrics[name] for each in run.reports if name in each.metrics]
        text += f" {name} went from {number_text(values[0])} to {number_text(values[-1])}."
    return text


def _have_steps(reports: Sequence[ExportReport]) -> bool:
    return all(each.global_step is not None for each in reports)


def _steps(reports: Sequence[ExportReport]) -> list[int]:
    if _have_steps(reports):
        return [each.global_step or 0 for each in reports]
    return list(range(1, len(reports) + 1))


def _metric_traces(run: RunHistory, steps: list[int]) -> list[dict[str, Any]]:
    """Draw each metric; those of another scale than the first are there to be switched on."""
    traces = []
    scale = 0.0
    for number, name in enumerate(run.metrics[:_METRICS_DRAWN]):
        values = [each.metrics.get(name, math.nan) for each in run.reports]
        top = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        scale = scale or top
        alike = scale / _SAME_SCALE <= top <= scale * _SAME_SCALE
        traces.append(
            {
                "name": label(name),
                "x": steps,
                "y": values,
                "mode": "lines+markers" if len(steps) < 200 else "lines",  # noqa: PLR2004
                "line": line(number),
                "marker": {"size": 6},
                "visible": True if number == 0 or alike else "legendonly",
            }
        )
    return traces


def _leaders(run: RunHistory, steps: list[int]) -> list[dict[str, Any]]:
    """Mark the champion and the best on the line of the first metric."""
    name = next(iter(run.metrics), "")
    leaders = (
        (run.champion, "champion", "star", 13),
        (run.best, f"best {name}", "circle-open", 17),
    )
    traces = []
    for report, role, symbol, size in leaders:
        if report is None or name not in report.metrics:
            continue
        at = next(i for i, each in enumerate(run.reports) if each is report)
        marker = {
            "symbol": symbol,
            "size": size,
            "color": "--gold",
            "line": {"width": 1, "color": "--panel"},
        }
        traces.append(
            {
                "name": label(role),
                "x": [steps[at]],
                "y": [report.metrics[name]],
                "mode": "markers",
                "marker": marker,
                "text": [label(name_of(report))],
            }
        )
    return traces


def _error_traces(run: RunHistory, steps: list[int]) -> list[dict[str, Any]]:
    errors = [_drawn(each.max_abs_error) for each in run.reports]
    budgets = [_drawn(_budget(each)) for each in run.reports]
    top = max((value for value in (*budgets, *errors) if value is not None), default=1.0)
    common: dict[str, Any] = {
        "x": steps,
        "yaxis": "y2",
        "text": [label(name_of(each)) for each in run.reports],
    }
    proven = [error if each.ok else None for each, error in zip(run.reports, errors, strict=True)]
    failed = [None if each.ok else e or top for each, e in zip(run.reports, errors, strict=True)]
    traces = [
        common
        | {
            "name": "error budget",
            "y": budgets,
            "mode": "lines",
            "line": {"color": "--faint", "dash": "dash", "width": 1.5},
        },
        common
        | {
            "name": "proven",
            "y": proven,
            "mode": "lines+markers" if len(steps) < 200 else "markers",  # noqa: PLR2004
            "line": {"color": "--good", "width": 1.5},
            "marker": {"size": 7 if len(steps) < 200 else 4, "color": "--good"},  # noqa: PLR2004
        },
    ]
    if run.failed:
        marker = {"symbol": "x", "size": 10, "color": "--bad"}
        traces.append(
            common | {"name": "no model", "y": failed, "mode": "markers", "marker": marker}
        )
    return traces


def _drawn(value: float | None) -> float | None:
    """Return what a logarithmic axis can show."""
    return value if value is not None and 0 < value < math.inf else None


def _budget(report: ExportReport) -> float | None:
    """Return the budget where the error is largest."""
    outputs = [output for check in report.checks for output in check.outputs]
    worst = max(outputs, key=lambda one: one.max_abs_error, default=None)
    return None if worst is None else worst.budget


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
