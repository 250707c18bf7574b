"""The permute-and-repeat test: which axes are the batch, shown on real rows.

The rows of a candidate are shuffled and repeated. If every output either stays as it was or moves
along one axis to the new size *with the rows where they should be*, then the module accepts other
batch sizes, that output axis follows, and rows are independent. Sizes that are equal by accident
fail it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from onnxport.inputs.dims import BATCH, follows
from onnxport.inputs.resize import take

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from onnxport.inputs.dims import Dim, Place, Run, Tensors

__all__ = ["BASE_ROWS", "BatchFinding", "find_batch", "probe"]

BASE_ROWS = 5
"""Rows of the batch that the test is run on; one run of these and one of twice as many and one."""
MAX_CANDIDATES = 40
"""Sets of axes tried per size; each wrong one usually fails at once, inside the module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFinding:
    """A set of axes that behaves like a batch.

    Args:
        places: The axes.
        outputs: For each output, the axes that followed.
        independent: Whether each row kept its result.
        rows: How many rows were run before and after.
    """

    places: tuple[Place, ...]
    outputs: tuple[Mapping[int, str], ...]
    independent: bool
    rows: tuple[int, int]


def find_batch(
    run: Run, call: Tensors, varied: Sequence[Dim], output_names: Sequence[str]
) -> BatchFinding | None:
    """Return the likeliest batch: rows are independent, or the first axes are at least accepted."""
    weak: BatchFinding | None = None
    for places, may_depend in _candidates(call, varied):
        found = probe(run, call, places, output_names)
        if found is None:
            continue
        if found.independent:
            return found
        weak = weak or (found if may_depend else None)
    return weak


def probe(
    run: Run, call: Tensors, places: Sequence[Place], output_names: Sequence[str]
) -> BatchFinding | None:
    """Run the test on one set of axes; ``None`` if the module refuses or no output follows."""
    size = call[places[0][0]].shape[places[0][1]]
    kept = min(size, BASE_ROWS)
    index = _shuffled_rows(kept)
    few = _at(call, places, torch.arange(kept))
    try:
        before, after = run(few), run(_at(few, places, index))
    except Exception:  # noqa: BLE001 - a module may refuse another size with any error
        return None
    if not len(before) == len(after) == len(output_names):
        return None
    outputs = list(zip(before, after, output_names, strict=True))
    moved = tuple(
        follows(old.shape, new.shape, BATCH, (kept, len(index)), name) for old, new, name in outputs
    )
    accepted = all(
        axes or old.shape == new.shape for axes, (old, new, _) in zip(moved, outputs, strict=True)
    )
    if not accepted or not any(moved):
        return None
    independent = all(
        _rows_agree(old, new, axes, index)
        for axes, (old, new, _) in zip(moved, outputs, strict=True)
    )
    return BatchFinding(
        places=tuple(places), outputs=moved, independent=independent, rows=(kept, len(index))
    )


# --- candidates -------------------------------------------------------------------------------


def _candidates(call: Tensors, varied: Sequence[Dim]) -> Iterator[tuple[tuple[Place, ...], bool]]:
    """Yield sets of axes that may be the batch, likeliest first, and whether rows may depend."""
    tried: set[tuple[Place, ...]] = set()
    for places, may_depend in _all_candidates(call, varied):
        if places and places not in tried:
            tried.add(places)
            yield places, may_depend


def _all_candidates(
    call: Tensors, varied: Sequence[Dim]
) -> Iterator[tuple[tuple[Place, ...], bool]]:
    for dim in varied:
        first = tuple(place for place in dim.places if place[1] == 0)
        # Rows that depend on each other are a batch only where every input has them.
        yield first, len(first) == sum(tensor.ndim > 0 for tensor in call)
        if first:
            yield dim.places, False
    taken = {place for dim in varied for place in dim.places}
    free = [
        {axis: size for axis, size in enumerate(tensor.shape) if (place, axis) not in taken}
        for place, tensor in enumerate(call)
    ]
    for axis in (0, 1, 2):
        sizes = [axes[axis] for axes in free if axes.get(axis, 0) > 0]
        for size, _ in Counter(sizes).most_common():
            for places in _of_one_size(free, size, axis):
                yield places, axis == 0 and {a for _, a in places} == {0}


def _of_one_size(
    free: Sequence[Mapping[int, int]], size: int, axis: int
) -> Iterator[tuple[Place, ...]]:
    """Yield ways to pick at most one axis of that size of each input, plausible ones first.

    The batch usually is the same early axis of all inputs; any input may have the size by accident,
    or have its batch elsewhere (the hidden state of an RNN).
    """
    options = [
        [*(a for a, s in axes.items() if s == size), None][:3] if size in axes.values() else [None]
        for axes in free
    ]
    picked = list(itertools.islice(itertools.product(*options), 4096))
    picked.sort(key=lambda picks: _implausibility(picks, free, size, axis))
    for picks in picked[:MAX_CANDIDATES]:
        yield tuple((place, a) for place, a in enumerate(picks) if a is not None)


def _implausibility(
    picks: Collection[int | None], free: Sequence[Mapping[int, int]], size: int, axis: int
) -> float:
    penalty = 0.0
    for pick, axes in zip(picks, free, strict=True):
        if size not in axes.values():
            continue
        if pick is None:
            # Leaving out an input that has the size where the others have it is the odd choice.
            penalty += 1.5 if axes.get(axis) == size else 0.7
        elif pick != axis:
            penalty += 0.5 + 0.1 * abs(pick - axis) + (0.7 if axes.get(axis) == size else 0.0)
    return penalty


# --- rows -------------------------------------------------------------------------------------


def _shuffled_rows(count: int) -> torch.Tensor:
    """Return each row once in another order, then ``count + 1`` more: shape ``(2 count + 1,)``."""
    # A generator of our own: the user's random numbers stay untouched.
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator)
    if count > 1 and bool((order == torch.arange(count)).all()):
        order = order.flip(0)
    return torch.cat([order, torch.randint(count, (count + 1,), generator=generator)])


def _at(call: Tensors, places: Sequence[Place], index: torch.Tensor) -> Tensors:
    axes: dict[int, list[int]] = {}
    for place, axis in places:
        axes.setdefault(place, []).append(axis)
    return tuple(
        take(tensor, axes[place], index) if place in axes else tensor
        for place, tensor in enumerate(call)
    )


def _rows_agree(
    before: torch.Tensor, after: torch.Tensor, dims: Mapping[int, str], index: torch.Tensor
) -> bool:
    """Tell whether an output is the old one under the same index, up to rounding."""
    if not dims:
        expected = before
    elif list(dims.values()) == [BATCH]:
        expected = before.index_select(next(iter(dims)), index)
    else:
        return len(dims) == 1  # rows flattened with another axis: the sizes follow, values unseen
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, after)
    scale = float(expected.abs().nan_to_num(posinf=0.0).max()) if expected.numel() else 0.0
    close = 1e3 * torch.finfo(expected.dtype).eps
    return torch.allclose(after, expected, rtol=close, atol=close * scale, equal_nan=True)
