"""Arguments that a function gets and never looks at: the labels in a batch given to a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from onnxport.tree import Example, flatten, rebuild

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from onnxport.tree import Path

__all__ = ["unused_tensors", "without"]

MAX_TENSORS = 16
"""Tensors of a call that are tried; each takes one run."""


class Unused:
    """Takes the place of a tensor: it can be passed on and unpacked, and anything else raises."""

    @override
    def __repr__(self) -> str:
        return "<a tensor that the call does not use>"


_UNUSED = Unused()


def unused_tensors(run: Callable[..., Any], example: Example) -> list[Path]:
    """Return the paths in ``(args, kwargs)`` of the tensors that a function does not use.

    Args:
        run: The function; deterministic, and it does not change its arguments.
        example: A call of it.

    Returns:
        Never all of them: a function that uses no tensor has no input to leave out.
    """
    _, found = flatten((example.args, dict(example.kwargs)))
    if len(found) > MAX_TENSORS:
        return []
    before = _flat(run(*example.args, **dict(example.kwargs)))
    unused: list[Path] = []
    for path, _ in found:
        if len(unused) + 1 < len(found) and _same(run, without(example, [*unused, path]), before):
            unused.append(path)
    return unused


def _same(run: Callable[..., Any], example: Example, before: Sequence[torch.Tensor]) -> bool:
    try:
        after = _flat(run(*example.args, **dict(example.kwargs)))
    except Exception:  # noqa: BLE001 - whatever the use of it raises, it was used
        return False
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before, after, strict=True)
    )


def without(example: Example, paths: Collection[Path]) -> Example:
    """Return the example with other objects in the place of some tensors."""
    spec, found = flatten((example.args, dict(example.kwargs)))
    left = set(paths)
    args, kwargs = rebuild(spec, [_UNUSED if path in left else t for path, t in found])
    return Example(args, kwargs)


def _flat(tree: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in flatten(tree)[1]]
