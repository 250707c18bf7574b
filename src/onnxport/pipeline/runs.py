"""Run a module in flat form, for its values or only for the shapes of its outputs."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from onnxport._torch_compat import FAKE_TENSOR_LIMITS, export_context, fake_tensors
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.exporter.flat import FlatModule

__all__ = ["ShapeProbe", "run_flat"]

Tensors = tuple[torch.Tensor, ...]

logger = logging.getLogger(__name__)

DEAR_S = 0.3
"""A run that takes longer is replaced by one on fake tensors where only shapes are asked for."""


def run_flat(
    module: FlatModule, tensors: Sequence[torch.Tensor], *, isolate: bool = False
) -> Tensors:
    """Run a flat module as an export would see it: no gradients, no autocast, no fast path.

    Args:
        module: The module.
        tensors: Its inputs; a module that writes to them gets copies.
        isolate: Let the run leave no trace in the module, though it usually leaves none.
    """
    fresh = isolated(module) if isolate or module.keeps_state else nullcontext()
    with preserved_globals(), export_context(), fresh:
        return tuple(tensor.detach() for tensor in module(*(tensor.clone() for tensor in tensors)))


class ShapeProbe:
    """Answers which shapes come out for which go in.

    Cheap modules are simply run. For dear ones fake tensors do, which have shapes and no values, so
    nothing is computed; where values decide (``.item()``, ``nonzero``), the module is run.

    Args:
        flat: The module.
    """

    def __init__(self, flat: FlatModule) -> None:
        self._flat = flat
        self._dear = False
        self._fake_works = True

    def __call__(self, tensors: Tensors) -> tuple[tuple[int, ...], ...] | None:
        """Return the outputs' shapes, or ``None`` where the module refuses the inputs."""
        if self._dear and self._fake_works:
            try:
                return self._fake(tensors)
            except FAKE_TENSOR_LIMITS:
                self._fake_works = False
        start = time.perf_counter()
        shapes = self._real(tensors)
        self._dear = self._dear or time.perf_counter() - start > DEAR_S
        return shapes

    def _real(self, tensors: Tensors) -> tuple[tuple[int, ...], ...] | None:
        try:
            return _shapes(run_flat(self._flat, tensors, isolate=True))
        except Exception:
            logger.debug("eager run refused", exc_info=True)
            return None

    def _fake(self, tensors: Tensors) -> tuple[tuple[int, ...], ...] | None:
        try:
            with fake_tensors(tensors) as fakes:
                return _shapes(run_flat(self._flat, fakes, isolate=True))
        except FAKE_TENSOR_LIMITS:
            raise
        except Exception:
            logger.debug("run on fake tensors refused", exc_info=True)
            return None


def _shapes(tensors: Tensors) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)
