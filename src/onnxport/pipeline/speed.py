"""How long runs of a proven model take, and PyTorch's own beside them."""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import isolated
from onnxport.inputs.resize import resize
from onnxport.validation.latency import LEAST, WARM_UP, latencies
from onnxport.validation.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from onnxport.config import ExportOptions
    from onnxport.exporter.flat import FlatModule
    from onnxport.pipeline.plan import Plan
    from onnxport.report import Check, Latency

__all__ = ["measure"]

logger = logging.getLogger(__name__)

BATCHES = (1, 8, 64)
FEWEST = 3
"""Turns at one size that the time must allow: one to warm up, and two that count."""


def measure(
    path: Path, plan: Plan, checks: Sequence[Check], options: ExportOptions
) -> tuple[tuple[Latency, ...], str]:
    """Measure a model on the providers that it is proven on, and the module itself.

    Runs are made on real rows, with the threads that this process has: beside training these are
    few, and training takes its share of the machine.

    Args:
        path: The model.
        plan: The module and its rows.
        checks: The proof.
        options: How long all of it may take, and one run.

    Returns:
        What was measured, and a warning, or ``""``.
    """
    end = time.perf_counter() + options.latency_s
    providers = tuple(dict.fromkeys(check.provider for check in checks))
    quickest = min((check.seconds for check in checks), default=0.0)
    found: list[Latency] = []
    try:
        if FEWEST * quickest * (len(providers) + 1) <= options.latency_s:
            with _ways(path, plan.flat, providers, options.verify.gpu_memory_mb) as ways:
                found += _at_sizes(ways, plan, end, options.verify.seconds_per_run)
    except Exception as error:  # user code runs in here; the model is proven all the same
        logger.debug("latency was not measured", exc_info=True)
        return tuple(found), f"How long runs take was not measured: {error}"
    if found:
        return tuple(found), ""
    seconds = f"{options.latency_s:g} s"
    return (
        (),
        f"How long runs take was not measured: in {seconds} there is no time for enough runs.",
    )


@contextmanager
def _ways(
    path: Path, flat: FlatModule, providers: Sequence[str], memory: int | None
) -> Iterator[Mapping[str, Callable[[Sequence[str], Sequence[torch.Tensor]], object]]]:
    """Load the model as one that serves it would, and make the module ready."""

    def eager(_: Sequence[str], tensors: Sequence[torch.Tensor]) -> object:
        return flat(*tensors)

    with ExitStack() as stack:
        ways: dict[str, Callable[[Sequence[str], Sequence[torch.Tensor]], object]] = {}
        for name in providers:
            session = stack.enter_context(closing(Session(path, name, gpu_memory_mb=memory)))
            ways[name] = session.run
        stack.enter_context(preserved_globals())
        if flat.keeps_state:
            stack.enter_context(isolated(flat))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.inference_mode())
        yield ways | {"eager": eager}


def _at_sizes(
    ways: Mapping[str, Callable[[Sequence[str], Sequence[torch.Tensor]], object]],
    plan: Plan,
    end: float,
    seconds_per_run: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Latency]:
    """Measure at one size after the other, as long as the next one can be afforded."""
    names = [spec.name for spec in plan.signature.inputs]
    sizes = BATCHES if plan.axes.batch is not None else BATCHES[:1]
    per_row = 0.0
    for place, rows in enumerate(sizes):
        share = (end - clock()) / (len(sizes) - place)
        expected = per_row * rows
        if expected > min(share / FEWEST, seconds_per_run * len(ways)):
            return
        tensors = resize(plan.calls[0], plan.axes.inputs, dict.fromkeys(plan.axes.batches, rows))
        # A module may write to what it is given; the others must not see that.
        fed = {name: tuple(tensor.clone() for tensor in tensors) for name in ways}
        runs = {name: partial(run, names, fed[name]) for name, run in ways.items()}
        _pass(runs, clock)  # memory is allocated, kernels are chosen for the size
        once = _pass(runs, clock)
        share = (end - clock()) / (len(sizes) - place)
        turns = int(share / once)
        if turns < FEWEST:
            return
        warm_up = min(WARM_UP, turns // FEWEST)
        least = max(2, min(LEAST, turns - warm_up))
        left = share - warm_up * once
        measured = latencies(runs, rows, left, clock, warm_up=warm_up, least=least)
        yield from measured
        per_row = sum(one.p50 for one in measured) / rows


def _pass(runs: Mapping[str, Callable[[], object]], clock: Callable[[], float]) -> float:
    """Run each way once, and return how long that took."""
    start = clock()
    for run in runs.values():
        run()
    return max(clock() - start, 1e-9)
