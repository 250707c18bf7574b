"""The error of a model at other sizes than those of training."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from onnxport.page.parts import Figure, Section, Table, axis, label, line
from onnxport.page.ratios import drawn_ratio, outputs_of, ratio_axis, true_ratio
from onnxport.page.wording import clipped, counted, name_of, part_text

if TYPE_CHECKING:
    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport

__all__ = ["by_size"]

_MOST_DIMS, _MOST_LINES = 6, 12


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
    for sizes, output in outputs_of([report]):
        if dim in sizes:
            at = found[output.name]
            at[sizes[dim]] = max(at.get(sizes[dim], 0.0), drawn_ratio(output))
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
        f"{sizes_run[-1]}; at most {part_text(true_ratio(top))} of a budget is used.",
        data=traces,
        layout={
            "xaxis": axis(
                clipped(dim, 40),
                type="log",
                tickvals=sizes_run[:24],
                ticktext=[str(s) for s in sizes_run[:24]],
            ),
            "yaxis": ratio_axis([value for at in found.values() for value in at.values()]),
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
    return true_ratio(at[size]) if size in at else None
