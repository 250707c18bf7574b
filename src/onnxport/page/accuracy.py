"""How far models are from PyTorch: by output, by size, by metric."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from onnxport.page.parts import Cell, Figure, Section, Table, axis, label, line
from onnxport.page.run import ratio_of
from onnxport.page.wording import clipped, counted, error_text, name_of, number_text, part_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport, MetricPair, OutputError

__all__ = ["by_output", "by_size", "parity"]

_MOST_OUTPUTS, _MOST_POINTS, _MOST_DIMS, _MOST_LINES = 20, 1500, 6, 12
_LEAST, _MOST = 1e-6, 1e3
_DECADES = range(-6, 4)
_BUDGET = {"color": "--bad", "width": 1.5, "dash": "dash"}


def by_output(run: RunHistory) -> Section:
    """Draw which part of its budget each output uses, in every run of every proven model."""
    found: dict[str, list[float]] = defaultdict(list)
    for _, output in _outputs(run.proven):
        found[output.name].append(_drawn(output))
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
        summary=f"At most {part_text(_shown(max(found[worst[0]])))} of a budget is used, by "
        f"{worst[0]}.",
        data=[*_boxes(drawn, found), *_points(run, drawn)],
        layout={
            "xaxis": _parts([*(v for each in found.values() for v in each), 1.2]),
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


def _outputs(reports: Iterable[ExportReport]) -> Iterable[tuple[dict[str, int], OutputError]]:
    return (
        (check.sizes, one) for each in reports for check in each.checks for one in check.outputs
    )


def _parts(drawn: Sequence[float]) -> dict[str, Any]:
    """Return an axis for parts of a budget, with as many ticks as can be read."""
    low, high = math.log10(min(drawn)), math.log10(max(drawn))
    steps = (1, 2, 5) if high - low < 2 else (1,)  # noqa: PLR2004
    ticks = [step * 10.0**decade for decade in _DECADES for step in steps]
    return axis(
        "part of the budget",
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick * 100:g} %" for tick in ticks],
        range=[low - 0.15, high + 0.15],
    )


def _drawn(output: OutputError) -> float:
    """Return a ratio that a logarithmic axis can show."""
    return min(_MOST, max(_LEAST, ratio_of(output)))


def _shown(drawn: float) -> float:
    return 0.0 if drawn <= _LEAST else math.inf if drawn >= _MOST else drawn


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
        (_drawn(output), names.index(output.name), sizes)
        for sizes, output in _outputs([shown])
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
    for _, output in _outputs(reports):
        if output.name not in worst or _drawn(output) > _drawn(worst[output.name]):
            worst[output.name] = output
    return Table(
        caption="Errors of each output over all proven models",
        columns=("output", "runs", "median part", "largest part", "error there", "budget there"),
        rows=tuple(
            (
                clipped(name, 80),
                f"{len(found[name]):,}",
                part_text(_shown(_quantiles(found[name])[2])),
                part_text(ratio_of(worst[name])),
                error_text(worst[name].max_abs_error),
                error_text(worst[name].budget),
            )
            for name in names[:200]
        ),
    )


def by_size(run: RunHistory) -> Section:
    """Draw the error of one model over each symbolic size."""
    candidates = [each for each in (run.shown, *reversed(run.proven)) if each is not None]
    shown = max(candidates, key=lambda each: sum(map(len, _sizes(each).values())), default=None)
    sizes = _sizes(shown) if shown else {}
    varied = [dim for dim, found in sizes.items() if len(found) > 1]
    if shown is None or not varied:
        return Section(
            name="sizes",
            title="Errors at other sizes",
            missing="no run at several sizes: no axis is dynamic, or no model was run.",
        )
    fixed = [f"{clipped(dim, 40)} {min(sizes[dim])}" for dim in sizes if dim not in varied]
    also = f" All at {', '.join(fixed)}." if fixed else ""
    return Section(
        name="sizes",
        title="Errors at other sizes",
        lead=f"The proof of {name_of(shown)}, which ran dynamic axes at several sizes. A line is "
        f"an output, a dot its largest error at a size.{also}",
        figures=tuple(
            _size_figure(shown, dim, number) for number, dim in enumerate(varied[:_MOST_DIMS])
        ),
    )


def _sizes(report: ExportReport) -> dict[str, set[int]]:
    """Return at which sizes each symbolic dimension was run."""
    found: dict[str, set[int]] = defaultdict(set)
    for check in report.checks:
        for dim, size in check.sizes.items():
            found[dim].add(size)
    return found


def _size_figure(report: ExportReport, dim: str, number: int) -> Figure:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for sizes, output in _outputs([report]):
        if dim in sizes:
            at = found[output.name]
            at[sizes[dim]] = max(at.get(sizes[dim], 0.0), _drawn(output))
    worst = sorted(found, key=lambda name: -max(found[name].values()))[:_MOST_LINES]
    sizes_run = sorted({size for each in found.values() for size in each})
    traces = [
        {
            "name": label(clipped(name, 30)),
            "x": sorted(found[name]),
            "y": [found[name][size] for size in sorted(found[name])],
            "mode": "lines+markers",
            "line": line(i),
            "marker": {"size": 8},
        }
        for i, name in enumerate(worst)
    ]
    top = max(max(at.values()) for at in found.values())
    return Figure(
        name=f"chart-size-{number}",
        title=f"Over {clipped(dim, 40)}",
        summary=f"Run at {counted(len(sizes_run), 'size')} of {dim}, from {sizes_run[0]} to "
        f"{sizes_run[-1]}; at most {part_text(_shown(top))} of a budget is used.",
        data=traces,
        layout={
            "xaxis": axis(
                clipped(dim, 40),
                type="log",
                tickvals=sizes_run[:24],
                ticktext=[str(s) for s in sizes_run[:24]],
            ),
            "yaxis": _parts([value for at in found.values() for value in at.values()]),
            "showlegend": len(traces) > 1,
        },
        table=Table(
            caption=f"Part of the budget that is used at each {clipped(dim, 40)}",
            columns=("output", *(f"{size:,}" for size in sizes_run[:24])),
            rows=tuple(
                (clipped(name, 80), *(part_text(_part(found[name], s)) for s in sizes_run[:24]))
                for name in worst
            ),
        ),
    )


def _part(at: dict[int, float], size: int) -> float | None:
    return _shown(at[size]) if size in at else None


def parity(run: RunHistory) -> Section:
    """Compare the metrics of the module's own validation, PyTorch's and ONNX's."""
    shown = run.with_most("metric_parity")
    found = shown.metric_parity if shown else None
    if shown is None or found is None:
        return Section(
            name="parity",
            title="Validation with the ONNX model",
            missing="not measured; OnnxExport(metrics=True) runs the module's own validation "
            "with PyTorch and with the model.",
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
