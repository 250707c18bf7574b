"""Is a value what its annotation says: for values that were read from anybody's JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

    Check = Callable[[Any], bool]

__all__ = ["conforms"]

_LARGEST = 1 << 63
"""Whole numbers above cannot be drawn, and no report has them."""


def conforms(value: object, kind: Any) -> bool:
    """Tell whether a value is of a type, all that it holds included.

    Whole numbers pass as ``float``, as they do in Python.

    Args:
        value: Anything.
        kind: A class, frozen dataclasses included, or a ``Literal``, a union, ``tuple[X, ...]`` or
            ``dict[K, V]`` of such.

    Example:
        >>> conforms({"a": (1, 2)}, dict[str, tuple[int, ...]]), conforms(True, int)
        (True, False)
    """
    return _check_of(kind)(value)


@cache
def _check_of(kind: Any) -> Check:
    """Return the check for a type; a report has thousands of values of some twenty types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    checks = tuple(_check_of(one) for one in arguments if one is not Ellipsis)
    if origin in {Union, UnionType}:
        return lambda value: any(check(value) for check in checks)
    if origin is tuple:
        (each,) = checks
        return lambda value: isinstance(value, tuple) and all(map(each, value))
    if origin is dict:
        key, item = checks
        return lambda value: (
            isinstance(value, dict) and all(map(key, value)) and all(map(item, value.values()))
        )
    return _plain(kind)


def _plain(kind: type[Any] | None) -> Check:
    if kind in {None, NoneType}:
        return lambda value: value is None
    if kind is int:
        return lambda value: type(value) is int and -_LARGEST < value < _LARGEST
    if kind is float:
        return lambda value: (
            type(value) is float or (type(value) is int and -_LARGEST < value < _LARGEST)
        )
    if not is_dataclass(kind):
        return lambda value: isinstance(value, kind)
    hints = get_type_hints(kind)
    parts = [(attrgetter(each.name), _check_of(hints[each.name])) for each in fields(kind)]
    return lambda value: isinstance(value, kind) and all(check(of(value)) for of, check in parts)
