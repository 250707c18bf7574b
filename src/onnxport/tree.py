"""Calls of a module as values: an example, and its tensors in a stable flat order.

Nested mappings, sequences, named tuples and dataclasses are walked; everything that is no tensor
is a constant of the call.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["Constant", "Example", "Leaf", "Node", "Spec", "flatten", "map_tensors", "rebuild"]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One call of a module.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> import torch
        >>> Example((torch.zeros(2, 3),), {"scale": 2.0}).kwargs
        {'scale': 2.0}
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Example:
        """Read a tensor, a tuple of arguments, a mapping of keyword arguments or an example."""
        if isinstance(value, Example):
            return value
        if isinstance(value, Mapping):
            return cls((), dict(value))
        return cls(tuple(value)) if type(value) in {tuple, list} else cls((value,))


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """The place of a tensor."""


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A value that is no tensor: a number, a string, ``None`` or an object."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A container: its type, the keys of its children, and the children."""

    kind: type
    keys: tuple[Any, ...]
    children: tuple[Spec, ...]


Spec = Leaf | Constant | Node
Path = tuple[Any, ...]


def flatten(tree: Any) -> tuple[Spec, list[tuple[Path, torch.Tensor]]]:
    """Split a tree into its structure and its tensors.

    Returns:
        The structure, and each tensor with the path of keys that leads to it, in tree order.
    """
    found: list[tuple[Path, torch.Tensor]] = []
    return _walk(tree, (), found), found


def _walk(tree: Any, path: Path, found: list[tuple[Path, torch.Tensor]]) -> Spec:
    if isinstance(tree, torch.Tensor):
        found.append((path, tree))
        return Leaf()
    items = _items(tree)
    if items is None:
        return Constant(tree)
    keys = tuple(key for key, _ in items)
    children = tuple(_walk(child, (*path, key), found) for key, child in items)
    return Node(type(tree), keys, children)


def _items(tree: Any) -> list[tuple[Any, Any]] | None:
    """Return the children of a container with their keys, or ``None`` for anything else."""
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, torch.Size):
        return None
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (tuple, list)):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        return [(name, getattr(tree, name)) for name in names if hasattr(tree, name)]
    return None


def rebuild(spec: Spec, tensors: Iterable[Any]) -> Any:
    """Put tensors back into a structure; the inverse of :func:`flatten`."""
    return _rebuild(spec, iter(tensors))


def _rebuild(spec: Spec, tensors: Iterator[Any]) -> Any:
    if isinstance(spec, Leaf):
        return next(tensors)
    if isinstance(spec, Constant):
        return spec.value
    children = [_rebuild(child, tensors) for child in spec.children]
    return _container(spec.kind, spec.keys, children)


def _container(kind: Any, keys: tuple[Any, ...], children: list[Any]) -> Any:
    if kind in {tuple, list}:
        return kind(children)
    if issubclass(kind, Mapping):
        items = dict(zip(keys, children, strict=True))
        # Dataclass-like mappings (transformers' ModelOutput) take their fields as keywords.
        if dataclasses.is_dataclass(kind):
            return kind(**items)  # type: ignore[operator]
        # The factory is not known any more; without one a missing key is an error, as in a dict.
        return kind(None, items) if issubclass(kind, defaultdict) else kind(items)
    if issubclass(kind, (tuple, list)):
        return kind(*children) if hasattr(kind, "_fields") else kind(children)
    rebuilt = object.__new__(kind)
    for key, child in zip(keys, children, strict=True):
        object.__setattr__(rebuilt, key, child)
    return rebuilt


def map_tensors(tree: Any, function: Any) -> Any:
    """Apply ``function`` to each tensor of a tree and keep the structure."""
    spec, found = flatten(tree)
    return rebuild(spec, [function(tensor) for _, tensor in found])
