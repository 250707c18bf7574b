"""Which part of its budget the error of each output uses."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from onnxport.page.parts import Figure, Section, Table, label
from onnxport.page.ratios import drawn_ratio, outputs_of, ratio_axis, true_ratio
from onnxport.page.run import ratio_of
from onnxport.page.wording import clipped, error_text, name_of, part_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport, OutputError

__all__ = ["by_output"]

_MOST_OUTPUTS, _MOST_POINTS = 20, 1500
_BUDGET = {"color": "--bad", "width": 1.5, "dash": "dash"}


def by_output(run: RunHistory) -> Section:
    """Draw which part of its budget each output uses, in every run of every proven model."""
    found: dict[str, list[float]] = defaultdict(list)
    for _, output in outputs_of(run.proven):
        found[output.name].append(drawn_ratio(output))
    if not found:
        return Section(
            name="outputs",
            title="Errors within their budgets",
            missing="No model was run: see the failures for the reason.",
        )
    worst = sorted(found, key=lambda name: -max(found[name]))
    drawn = list(reversed(worst[:_MOST_OUTPUTS]))
    height = 130 + 62 * len(drawn)
    figure = Figure(
        name="chart-outputs",
        title="Part of the error budget that is used, for each output",
        summary=f"At most {part_text(true_ratio(max(found[worst[0]])))} of a budget is used, by "
        f"{worst[0]}.",
        data=[*_boxes(drawn, found), *_points(run, drawn)],
        layout={
            "xaxis": ratio_axis([*(v for each in found.values() for v in each), 1.2]),
            "yaxis": {
                "tickvals": list(range(len(drawn))),
                "ticktext": [label(clipped(name, 22)) for name in drawn],
                "range": [-0.6, len(drawn) - 0.4],
                "showgrid": False,
            },
            "shapes": [
                {
                    "type": "line",
                    "x0": 1,
                    "x1": 1,
                    "y0": 0,
                    "y1": 1,
                    "yref": "paper",
                    "line": _BUDGET,
                }
            ],
        },
        height=height,
        table=_output_table(worst, found, run.proven),
    )
    return Section(
        name="outputs",
        title="Errors within their budgets",
        lead="PyTorch runs the same rows in float64, too; ONNX Runtime may be a small factor "
        "further from that than PyTorch itself is. This is its budget. Boxes: half of all runs of "
        "all models. Dots: the runs of one model.",
        figures=(figure,),
    )


def _boxes(names: Sequence[str], found: dict[str, list[float]]) -> list[dict[str, Any]]:
    parts = [_quantiles(found[name]) for name in names]
    keys = ("lowerfence", "q1", "median", "q3", "upperfence")
    return [
        {
            "type": "box",
            "orientation": "h",
            "name": "all models",
            "y": list(range(len(names))),
            **{key: [part[i] for part in parts] for i, key in enumerate(keys)},
            "line": {"color": "--series-1", "width": 1.5},
            "fillcolor": "--box",
            "width": 0.5,
            "hoverinfo": "x",
        }
    ]


def _quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(part * (len(ordered) - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]


def _points(run: RunHistory, names: Sequence[str]) -> list[dict[str, Any]]:
    """Draw the runs of the shown model, apart from each other, and the same at each making."""
    shown = run.with_most("checks")
    if shown is None or not shown.ok:
        return []
    rows = [
        (drawn_ratio(output), names.index(output.name), sizes)
        for sizes, output in outputs_of([shown])
        if output.name in names
    ][:_MOST_POINTS]
    return [
        {
            "name": label(clipped(name_of(shown), 40)),
            "x": [ratio for ratio, _, _ in rows],
            "y": [at + (i * 0.618 % 1 - 0.5) * 0.4 for i, (_, at, _) in enumerate(rows)],
            "text": [label(", ".join(f"{k} {v}" for k, v in sizes.items())) for *_, sizes in rows],
            "mode": "markers",
            "marker": {"color": "--series-2", "size": 7, "opacity": 0.8},
        }
    ]


def _output_table(
    names: Sequence[str], found: dict[str, list[float]], reports: Sequence[ExportReport]
) -> Table:
    worst: dict[str, OutputError] = {}
    for _, output in outputs_of(reports):
        if output.name not in worst or drawn_ratio(output) > drawn_ratio(worst[output.name]):
            worst[output.name] = output
    return Table(
        caption="Errors of each output over all proven models",
        columns=("output", "runs", "median part", "largest part", "error there", "budget there"),
        rows=tuple(
            (
                clipped(name, 80),
                f"{len(found[name]):,}",
                part_text(true_ratio(_quantiles(found[name])[2])),
                part_text(ratio_of(worst[name])),
                error_text(worst[name].max_abs_error),
                error_text(worst[name].budget),
            )
            for name in names[:200]
        ),
    )
