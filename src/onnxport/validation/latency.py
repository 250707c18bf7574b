"""How long runs take: warmed up, interleaved, as medians, within a budget of time."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from onnxport.report import Latency

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["latencies"]

WARM_UP = 3
"""Runs that do not count: memory is allocated, kernels are chosen."""
LEAST = 5
"""Runs that count at least, whatever they cost."""
MOST = 1000


def latencies(
    ways: Mapping[str, Callable[[], object]],
    batch: int,
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
    *,
    warm_up: int = WARM_UP,
    least: int = LEAST,
) -> list[Latency]:
    """Measure several ways of running the same rows.

    They take turns, so that what else the machine does in the meantime hits all of them.

    Args:
        ways: What to run, by name; each runs once and waits for its result.
        batch: Rows of a run.
        budget_s: For all of them together, in seconds; that each runs ``least`` times comes first.
        clock: Gives seconds.
        warm_up: Runs of each that do not count.
        least: Runs of each that count; two at least.

    Returns:
        One result per way, in their order.

    Example:
        >>> [found] = latencies({"nothing": lambda: None}, batch=8, budget_s=0.01)
        >>> found.name, found.batch, found.p50 <= found.p95
        ('nothing', 8, True)
    """
    for run in ways.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = clock() + budget_s
    for turn in range(MOST):
        if turn >= least and clock() >= end:
            break
        for name, run in ways.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return [_latency(name, batch, taken) for name, taken in times.items()]


def _latency(name: str, batch: int, taken: list[float]) -> Latency:
    middle = statistics.median(taken)
    late = statistics.quantiles(taken, n=20, method="inclusive")[-1]
    throughput = batch / middle if middle else float("inf")
    return Latency(
        name=name, batch=batch, runs=len(taken), p50=middle, p95=late, throughput=throughput
    )
