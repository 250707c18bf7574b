"""Metrics and errors over training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from onnxport.page.checkpoints import checkpoints
from onnxport.page.parts import Figure, Section, axis, label, line, log_axis
from onnxport.page.wording import (
    counted,
    error_text,
    name_of,
    number_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport

__all__ = ["timeline"]

_METRICS_DRAWN = 8
_SAME_SCALE = 5.0


def timeline(run: RunHistory) -> Section:
    """Draw metrics and the largest error over training."""
    steps = _steps(run.reports)
    errors = _error_traces(run, steps)
    drawn = [value for trace in errors for value in trace["y"]]
    layout = {
        "xaxis": axis("step" if _have_steps(run.reports) else "checkpoint", anchor="y2"),
        "yaxis": axis("metric", domain=[0.46, 1]),
        "yaxis2": log_axis("largest error", drawn, error_text, domain=[0, 0.4]),
    }
    figure = Figure(
        name="chart-timeline",
        title="Metrics, and the largest error of each model",
        summary=_timeline_in_words(run),
        data=[*_metric_traces(run, steps), *_leaders(run, steps), *errors],
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
