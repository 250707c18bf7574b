"""Calls of a module as values: an example, and its tensors in a stable flat order.

Nested mappings, sequences, named tuples, dataclasses and plain objects that hold tensors (a cache,
a graph) are walked; everything that is no tensor is a constant of the call.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

__all__ = [
    "Constant",
    "Example",
    "Leaf",
    "Node",
    "Spec",
    "constants",
    "flatten",
    "map_tensors",
    "rebuild",
    "same_structure",
]

MAX_DEPTH = 4
"""How deep objects inside of objects are searched for tensors."""


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
    """A container: its type, the keys of its children, and the children.

    ``template`` is the object itself where it cannot be made from its children alone; it is copied,
    and the copy gets the children.
    """

    kind: type
    keys: tuple[Any, ...]
    children: tuple[Spec, ...]
    template: Any = dataclasses.field(default=None, compare=False)


_OPAQUE = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    ModuleType,
    FunctionType,
    MethodType,
    torch.nn.Module,
    torch.Size,
    torch.dtype,
    torch.device,
)
"""What is never searched for tensors."""

Spec = Leaf | Constant | Node
Path = tuple[Any, ...]


def flatten(tree: Any) -> tuple[Spec, list[tuple[Path, torch.Tensor]]]:
    """Split a tree into its structure and its tensors.

    Returns:
        The structure, and each tensor with the path of keys that leads to it, in tree order.
    """
    found: list[tuple[Path, torch.Tensor]] = []
    return _walk(tree, (), found, ()), found


def _walk(
    tree: Any, path: Path, found: list[tuple[Path, torch.Tensor]], inside: tuple[int, ...]
) -> Spec:
    if isinstance(tree, torch.Tensor):
        found.append((path, tree))
        return Leaf()
    items = None if id(tree) in inside else _items(tree)  # an object may lead back to itself
    if items is None:
        return Constant(tree)
    keys = tuple(key for key, _ in items)
    around = (*inside, id(tree))
    children = tuple(_walk(child, (*path, key), found, around) for key, child in items)
    return Node(type(tree), keys, children, tree if _needs_template(tree) else None)


def _needs_template(tree: Any) -> bool:
    """Tell whether a container holds more than its children say."""
    if isinstance(tree, Mapping):
        return False
    if isinstance(tree, (tuple, list)):
        return bool(getattr(tree, "__dict__", None))
    return dataclasses.is_dataclass(tree) or _is_object(tree)


def _items(tree: Any) -> list[tuple[Any, Any]] | None:
    """Return the children of a container with their keys, or ``None`` for anything else."""
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (tuple, list)):
        return None if isinstance(tree, torch.Size) else list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        return [(name, getattr(tree, name)) for name in names if hasattr(tree, name)]
    if _is_object(tree):
        return [(name, value) for name, value in vars(tree).items() if _holds_tensor(value)]
    return None


def _is_object(value: Any) -> bool:
    """Tell whether a value is a plain object of some library that holds tensors in attributes."""
    if isinstance(value, (Mapping, tuple, list, torch.Tensor)) or dataclasses.is_dataclass(value):
        return False
    return _holds_tensor(value)


def _holds_tensor(value: Any, depth: int = MAX_DEPTH) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, _OPAQUE):
        return False
    return any(_holds_tensor(child, depth - 1) for child in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    """Return what a container or an object holds."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    attributes: Iterable[Any] = getattr(value, "__dict__", {}).values()
    return attributes


def rebuild(spec: Spec, tensors: Iterable[Any], *, fresh: bool = False) -> Any:
    """Put tensors back into a structure; the inverse of :func:`flatten`.

    Args:
        spec: The structure.
        tensors: The tensors, in tree order.
        fresh: Make small objects without tensors anew: a call may fill an empty cache, and the next
            one must not see it.
    """
    return _rebuild(spec, iter(tensors), fresh)


def _rebuild(spec: Spec, tensors: Iterator[Any], fresh: bool) -> Any:
    if isinstance(spec, Leaf):
        return next(tensors)
    if isinstance(spec, Constant):
        return _anew(spec.value) if fresh else spec.value
    children = [_rebuild(child, tensors, fresh) for child in spec.children]
    if spec.template is not None and issubclass(spec.kind, (tuple, list)):
        rebuilt = _container(spec.kind, spec.keys, children)
        vars(rebuilt).update(vars(spec.template))
        return rebuilt
    if spec.template is not None:
        rebuilt = copy.copy(spec.template)
        for key, child in zip(spec.keys, children, strict=True):
            object.__setattr__(rebuilt, key, child)
        return rebuilt
    return _container(spec.kind, spec.keys, children)


MAX_PARTS = 200
"""Parts of an object that is made anew for each call."""


def _anew(value: Any) -> Any:
    """Copy an object, unless it is large or has parts that are no plain values."""
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__"):
        return value
    queue, seen = [value], 0
    while queue:
        part = queue.pop()
        seen += 1
        if seen > MAX_PARTS:
            return value
        if isinstance(part, _OPAQUE):
            continue
        if not isinstance(part, (Mapping, tuple, list)) and not hasattr(part, "__dict__"):
            return value  # a lock, a handle, something of C
        queue += _parts(part)
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - code of the object's; without a copy it is shared, as always
        return value


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


def map_tensors(tree: Any, function: Any, *, fresh: bool = False) -> Any:
    """Apply ``function`` to each tensor of a tree and keep the structure.

    Args:
        tree: Any tree.
        function: Tensor in, tensor out.
        fresh: See :func:`rebuild`.
    """
    spec, found = flatten(tree)
    return rebuild(spec, [function(tensor) for _, tensor in found], fresh=fresh)


def constants(spec: Spec, path: Path = ()) -> dict[Path, Any]:
    """Return every value of a structure that is no tensor, by its path."""
    if isinstance(spec, Constant):
        return {path: spec.value}
    if isinstance(spec, Leaf):
        return {}
    found: dict[Path, Any] = {}
    for key, child in zip(spec.keys, spec.children, strict=True):
        found |= constants(child, (*path, key))
    return found


def same_structure(a: Spec, b: Spec) -> bool:
    """Tell whether two structures have tensors and containers at the same places.

    Constants may differ in value, but ``None`` is another structure than a value.
    """
    if isinstance(a, Constant) and isinstance(b, Constant):
        return (a.value is None) == (b.value is None)
    if isinstance(a, Node) and isinstance(b, Node):
        if a.kind is not b.kind or a.keys != b.keys:
            return False
        return all(same_structure(x, y) for x, y in zip(a.children, b.children, strict=True))
    return isinstance(a, Leaf) and isinstance(b, Leaf)
