"""Symbolic dimensions: where they stand, what they are called, which output axes follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from onnxport.inputs.resize import take

if TYPE_CHECKING:
    from onnxport.report import AxisEvidence
    from onnxport.signature import Axes

__all__ = [
    "BATCH",
    "AxisPlan",
    "Dim",
    "Place",
    "Run",
    "Shapes",
    "Tensors",
    "dim_name",
    "follows",
    "grown",
    "size_of",
]

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[Tensors], Tensors]
Shapes = Callable[[Tensors], "tuple[tuple[int, ...], ...] | None"]
"""Gives the shapes of the outputs for some inputs, or ``None`` where the module refuses them."""

Place = tuple[int, int]
"""Which input, which axis of it."""

BATCH = "batch"
IMAGE_RANK = 4
SEQUENCE_RANKS = (2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dim:
    """Axes that always have one size together.

    Args:
        places: Where it stands.
        kind: ``"varied"``, ``"probed"``, ``"accepted"`` or ``"declared"``.
        text: The evidence, in words.
        step: Sizes must be a multiple of this from the observed ones, as far as was seen.
    """

    places: tuple[Place, ...]
    kind: str
    text: str
    step: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisPlan:
    """Which axes are dynamic, and why.

    Args:
        inputs: The dynamic axes of each input.
        outputs: The dynamic axes of each output.
        batch: Name of the dimension along which rows are independent or at least accepted.
        batches: All dimensions of that kind; inputs may have batches of their own.
        independent: Whether each row of the batch kept its result in another batch.
        steps: For each other dimension, by which step its sizes may grow.
        evidence: One entry per symbolic dimension.
        warnings: What could not be shown.
    """

    inputs: Axes
    outputs: Axes
    batch: str | None = None
    batches: tuple[str, ...] = ()
    independent: bool = False
    steps: Mapping[str, int] | None = None
    evidence: tuple[AxisEvidence, ...] = ()
    warnings: tuple[str, ...] = ()

    def only(self, dims: Iterable[str], reason: str) -> AxisPlan:
        """Return a plan where all other dimensions are static; ``reason`` becomes a warning."""
        kept = set(dims)
        inputs = tuple({a: d for a, d in axes.items() if d in kept} for axes in self.inputs)
        # Sizes that derive from several dimensions stay symbolic while any of these is.
        lost = {d for axes in self.inputs for d in axes.values()} - kept
        outputs = tuple(
            {a: d for a, d in axes.items() if kept and d not in lost} for axes in self.outputs
        )
        return AxisPlan(
            inputs=inputs,
            outputs=outputs,
            batch=self.batch if self.batch in kept else None,
            batches=tuple(d for d in self.batches if d in kept),
            independent=self.independent,
            steps={d: step for d, step in (self.steps or {}).items() if d in kept},
            evidence=tuple(entry for entry in self.evidence if entry.dim in kept),
            warnings=(*self.warnings, reason),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every symbolic dimension of an input, in order."""
        return tuple(dict.fromkeys(d for axes in self.inputs for d in axes.values()))


def size_of(call: Tensors, dim: Dim) -> int:
    """Return the size that a dimension has in a call."""
    place, axis = dim.places[0]
    return call[place].shape[axis]


def grown(call: Tensors, places: Sequence[Place], size: int) -> Tensors:
    """Return the call with some axes repeated or cut to ``size``."""
    axes: dict[int, list[int]] = {}
    for place, axis in places:
        axes.setdefault(place, []).append(axis)
    return tuple(
        take(x, axes[i], torch.arange(size) % max(x.shape[axes[i][0]], 1)) if i in axes else x
        for i, x in enumerate(call)
    )


def dim_name(
    places: Sequence[Place],
    call: Tensors,
    names: Sequence[str],
    known: Sequence[Mapping[int, str]],
    taken: set[str],
) -> str:
    """Name a dimension that is not the batch by where it stands: sequence, height, width.

    Args:
        places: Where it stands.
        call: One call.
        names: Names of the inputs.
        known: The axes of each input that have a name already.
        taken: Names that are used up.
    """
    place, axis = places[0]
    rank = call[place].ndim
    sequence = 0 if known[place].get(1) == BATCH else 1  # (L, N, E), or (N, L) and (N, L, E)
    usual: str | None = None
    if rank == IMAGE_RANK and axis in {2, 3}:
        usual = "height" if axis == 2 else "width"  # noqa: PLR2004
    elif rank in SEQUENCE_RANKS and axis == sequence:
        usual = "sequence"
    if usual is None:
        return _free(f"{names[place]}_dim{axis}", taken)
    return usual if usual not in taken else _free(f"{names[place]}_{usual}", taken)


def _free(name: str, taken: set[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique


def follows(
    before: Sequence[int], after: Sequence[int], dim: str, sizes: tuple[int, int], name: str
) -> dict[int, str]:
    """Return the axes of an output that changed with a dimension.

    Args:
        before: Shape of the output at the first size.
        after: Shape of the output at the second size.
        dim: Name of the dimension.
        sizes: Its first and second size.
        name: Name of the output.

    Returns:
        Axis -> ``dim`` where the axis has the size itself, else a name of its own.
    """
    if len(before) != len(after):
        return {}
    return {
        axis: dim if (old, new) == sizes else f"{name}_dim{axis}"
        for axis, (old, new) in enumerate(zip(before, after, strict=True))
        if old != new
    }
