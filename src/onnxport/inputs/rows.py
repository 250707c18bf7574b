"""More rows than one call has: those of other calls, and variants that take other branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from onnxport.inputs.resize import negate, scale, shuffle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnxport.inputs.dims import AxisPlan, Tensors

__all__ = ["many_rows"]

ENOUGH_ROWS = 3
MAX_ROWS = 64


def many_rows(calls: Sequence[Tensors], axes: AxisPlan) -> Tensors:
    """Return the first call with the rows of others of the same other sizes behind its own.

    A call of one row becomes one of at least :data:`ENOUGH_ROWS`, with shuffled, negated and scaled
    copies of it: repeats of one row would not show that rows are mixed up.
    """
    first = calls[0]
    batch = [{a for a, d in dims.items() if d in axes.batches} for dims in axes.inputs]
    if not any(batch):
        return first
    same = [call for call in calls[1:] if _fits(first, call, batch)]
    rows = _together([first, *same], batch)
    if _count(rows, batch) >= ENOUGH_ROWS:
        return rows
    # The batch must stay one size for all inputs, so every variant has all of them.
    return _together([rows, shuffle(rows), negate(rows), scale(rows)], batch)


def _fits(first: Tensors, other: Tensors, batch: Sequence[set[int]]) -> bool:
    """Tell whether only the batch differs; inputs without one must be the same."""
    return all(
        _static_sizes(a, axes) == _static_sizes(b, axes) if axes else torch.equal(a, b)
        for a, b, axes in zip(first, other, batch, strict=True)
    )


def _static_sizes(tensor: torch.Tensor, batch: set[int]) -> list[int]:
    return [size for axis, size in enumerate(tensor.shape) if axis not in batch]


def _together(calls: Sequence[Tensors], batch: Sequence[set[int]]) -> Tensors:
    """Concatenate along the batch; inputs with two batch axes keep those of the first call."""
    if any(len(axes) > 1 for axes in batch):
        return calls[0]
    return tuple(
        _cut(torch.cat(tensors, dim=next(iter(axes))), next(iter(axes))) if axes else tensors[0]
        for tensors, axes in zip(zip(*calls, strict=True), batch, strict=True)
    )


def _cut(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.narrow(axis, 0, min(tensor.shape[axis], MAX_ROWS))


def _count(call: Tensors, batch: Sequence[Mapping[int, str] | set[int]]) -> int:
    return next(x.shape[next(iter(axes))] for x, axes in zip(call, batch, strict=True) if axes)
