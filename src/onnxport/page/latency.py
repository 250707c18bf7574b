"""How long runs of a model take."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from onnxport.page.parts import Figure, Section, Table, axis, label, line, log_axis
from onnxport.page.wording import clipped, duration_text, name_of, number_text

if TYPE_CHECKING:
    from onnxport.page.run import RunHistory
    from onnxport.report import Latency

__all__ = ["latency"]

_MOST_LINES = 12


def latency(run: RunHistory) -> Section:
    """Draw how long runs take over the batch size, and how many rows that is in a second."""
    shown = run.with_most("latencies")
    if shown is None:
        return Section(
            name="latency",
            title="Speed",
            missing="not measured; OnnxExport(latency=True) runs the model and PyTorch in turns.",
        )
    ways: dict[str, list[Latency]] = defaultdict(list)
    for one in sorted(shown.latencies, key=lambda each: each.batch):
        ways[one.name].append(one)
    drawn = dict(list(ways.items())[:_MOST_LINES])
    return Section(
        name="latency",
        title="Speed",
        lead=f"Runs of {name_of(shown)} and of PyTorch, in turns, after a warm-up. Lines are "
        "medians (p50); bars reach to what one run in twenty exceeds (p95).",
        figures=(_latency_figure(drawn), _throughput_figure(drawn)),
    )


def _batches(ways: dict[str, list[Latency]]) -> list[int]:
    return sorted({one.batch for each in ways.values() for one in each})


def _batch_axis(ways: dict[str, list[Latency]]) -> dict[str, Any]:
    batches = _batches(ways)[:24]
    return axis("batch", type="log", tickvals=batches, ticktext=[str(each) for each in batches])


def _latency_figure(ways: dict[str, list[Latency]]) -> Figure:
    traces = [
        {
            "name": label(_short(name)),
            "x": [one.batch for one in each],
            "y": [one.p50 * 1e3 for one in each],
            "error_y": {
                "type": "data",
                "array": [max(0.0, one.p95 - one.p50) * 1e3 for one in each],
                "symmetric": False,
                "thickness": 1.2,
                "width": 3,
            },
            "mode": "lines+markers",
            "line": line(number),
            "marker": {"size": 7},
        }
        for number, (name, each) in enumerate(ways.items())
    ]
    return Figure(
        name="chart-latency",
        title="Time of a run",
        summary=_fastest_in_words(ways),
        data=traces,
        layout={
            "xaxis": _batch_axis(ways),
            "yaxis": log_axis("ms", _milliseconds(ways), lambda t: f"{t:g}"),
        },
        table=_latency_table(ways),
    )


def _milliseconds(ways: dict[str, list[Latency]]) -> list[float]:
    """Return all that is drawn in a chart of times, the tips of its bars included."""
    return [time * 1e3 for each in ways.values() for one in each for time in (one.p50, one.p95)]


def _rates(ways: dict[str, list[Latency]]) -> list[float]:
    return [one.throughput for each in ways.values() for one in each]


def _fastest_in_words(ways: dict[str, list[Latency]]) -> str:
    batch = _batches(ways)[-1]
    at = [one for each in ways.values() for one in each if one.batch == batch]
    best = min(at, key=lambda one: one.p50)
    text = f"At batch {batch}, {_short(best.name)} is the fastest: {duration_text(best.p50)}"
    eager = next((one for one in at if one.name == "eager" and one is not best), None)
    if eager is None or not best.p50 > 0:
        return f"{text}."
    return f"{text}, {eager.p50 / best.p50:.1f} times as fast as PyTorch as it is."


def _latency_table(ways: dict[str, list[Latency]]) -> Table:
    return Table(
        caption="Time of a run, for each way of running the model and each batch size",
        columns=("way", "batch", "p50", "p95", "rows/s", "runs"),
        rows=tuple(
            (
                _short(one.name),
                f"{one.batch:,}",
                duration_text(one.p50),
                duration_text(one.p95),
                _rate(one.throughput),
                f"{one.runs:,}",
            )
            for each in ways.values()
            for one in each
        ),
        at_once=60,
    )


def _throughput_figure(ways: dict[str, list[Latency]]) -> Figure:
    traces = [
        {
            "name": label(_short(name)),
            "x": [one.batch for one in each],
            "y": [one.throughput for one in each],
            "mode": "lines+markers",
            "line": line(number),
            "marker": {"size": 7},
        }
        for number, (name, each) in enumerate(ways.items())
    ]
    best = max((one for each in ways.values() for one in each), key=lambda one: one.throughput)
    return Figure(
        name="chart-throughput",
        title="Rows in a second",
        summary=f"Most rows in a second: {_rate(best.throughput)}, with {_short(best.name)} at "
        f"batch {best.batch}.",
        data=traces,
        layout={"xaxis": _batch_axis(ways), "yaxis": log_axis("rows/s", _rates(ways), _rate)},
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else number_text(value)  # noqa: PLR2004


def _short(name: str) -> str:
    """Return the name of a way as people say it."""
    spoken = {"eager": "PyTorch eager", "compiled": "PyTorch compiled"}
    return clipped(spoken.get(name, name.removesuffix("ExecutionProvider")), 40)
