"""Dimensions that were seen to vary: which axes belong together, and which sizes are accepted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from onnxport.inputs.dims import Dim, grown, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxport.inputs.dims import Place, Shapes, Tensors

__all__ = ["accepted_dims", "stepped", "untied", "varied_dims"]

STEPS = (1, 2, 4, 8, 16, 32, 64)
"""Steps that networks with pooling and upsampling ask for."""
MAX_UNTIED = 6
"""Axes of one size that are tried apart; more are taken to belong together."""


def varied_dims(calls: Sequence[Tensors], names: Sequence[str]) -> list[Dim]:
    """Return the axes that differed between calls; axes that differed alike are one dimension.

    Args:
        calls: Observed calls of one structure.
        names: Names of the inputs.
    """
    groups: dict[tuple[int, ...], list[Place]] = {}
    for place, tensors in enumerate(zip(*calls, strict=True)):
        for axis, sizes in enumerate(zip(*(tensor.shape for tensor in tensors), strict=True)):
            if len(set(sizes)) > 1:
                groups.setdefault(sizes, []).append((place, axis))
    return [
        Dim(
            places=tuple(places),
            kind="varied",
            text=f"{_where(places, names)} had sizes {sorted(set(sizes))}",
            step=math.gcd(*(size - sizes[0] for size in sizes)),
        )
        for sizes, places in groups.items()
    ]


def _where(places: Sequence[Place], names: Sequence[str]) -> str:
    return ", ".join(f"{names[place]}[{axis}]" for place, axis in places)


def accepted_dims(shapes: Shapes, call: Tensors, names: Sequence[str]) -> list[Dim]:
    """Return the axes that a module takes at other sizes, for want of other evidence.

    Axes of one size at one position go together where the module takes them so.

    Args:
        shapes: Runs the module for its shapes.
        call: An observed call.
        names: Names of the inputs.
    """
    groups: dict[tuple[int, int], list[Place]] = {}
    for place, tensor in enumerate(call):
        for axis, size in enumerate(tensor.shape):
            if size > 1:  # a size of one may be there to be broadcast
                groups.setdefault((axis, size), []).append((place, axis))
    together = [_accepted(tuple(places), names) for places in groups.values()]
    found: list[Dim] = []
    for dim in together:
        alone = [_accepted((place,), names) for place in dim.places]
        candidates = [dim] if _moves(shapes, call, dim.places, dim) else alone
        found += [one for one in candidates if _moves(shapes, call, one.places, one)]
    return found


def _accepted(places: tuple[Place, ...], names: Sequence[str]) -> Dim:
    text = f"other sizes of {_where(places, names)} are accepted; no call had one"
    return Dim(places=places, kind="accepted", text=text)


def untied(shapes: Shapes, call: Tensors, dim: Dim, names: Sequence[str]) -> list[Dim]:
    """Split a dimension whose axes were equal in all calls, but need not be.

    An axis, or a pair, that the module accepts at another size while the rest stays is a dimension
    of its own: height and width of square images, source and target of a translation.
    """
    rest = list(dim.places)
    if not 1 < len(rest) <= MAX_UNTIED:
        return [dim]
    apart: list[tuple[Place, ...]] = []
    for count in (1, 2):
        for some in _subsets(rest, count):
            if set(some) <= set(rest) and len(rest) > count and _moves(shapes, call, some, dim):
                apart.append(some)
                rest = [place for place in rest if place not in some]
    parts = [*apart, tuple(rest)] if rest else apart
    parts.sort(key=lambda places: places[0])
    return [replace(dim, places=places, text=_text(dim, places, names, parts)) for places in parts]


def _subsets(places: Sequence[Place], count: int) -> Iterator[tuple[Place, ...]]:
    yield from itertools.combinations(tuple(places), count)


def _moves(shapes: Shapes, call: Tensors, places: tuple[Place, ...], dim: Dim) -> bool:
    size = size_of(call, dim)
    # By the step that the calls showed: any other size may be refused for another reason. Longer
    # and shorter: a mask that is too long may be cut to the rest without being a size of its own.
    tried = (size + dim.step, max(size - dim.step, 1))
    return all(shapes(grown(call, places, new)) is not None for new in tried)


def _text(
    dim: Dim, places: Sequence[Place], names: Sequence[str], parts: Sequence[tuple[Place, ...]]
) -> str:
    if len(parts) == 1:
        return dim.text
    return f"{dim.text}; {_where(places, names)} also changes alone"


def stepped(shapes: Shapes, call: Tensors, dim: Dim) -> Dim:
    """Find by which step sizes of a dimension may grow: 1, or a power of two up to what was seen.

    A network that halves an image five times refuses all sizes that are no multiples of 32, or
    worse, gives other shapes back; the module itself says so when it runs.
    """
    size, seen = size_of(call, dim), dim.step
    for step in (*(step for step in STEPS if step < seen), seen):
        tried = (size + step, size - step)
        if any(new > 0 and shapes(grown(call, dim.places, new)) is not None for new in tried):
            text = dim.text if step == 1 else f"{dim.text}; accepted in steps of {step}"
            return replace(dim, step=step, text=text)
    return replace(dim, text=f"{dim.text}; no other size is accepted with these rows")
