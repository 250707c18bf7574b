"""Names for the tensors of a call and of its result: stable, valid and unique."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from onnxport.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from onnxport.tree import Path

__all__ = ["input_names", "output_names"]


def input_names(
    forward: Callable[..., Any], paths: Sequence[Path], given: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """Name the tensors of a call ``(args, kwargs)``.

    A tensor that is an argument gets the parameter's name; one inside a mapping, named tuple or
    dataclass gets its key; one inside a list gets the list's name and its index. Names that would
    meet twice are written with their whole path.

    Args:
        forward: The function that is called; its signature gives the parameters' names.
        paths: For each tensor, its path in ``(args, kwargs)``.
        given: Names from the user, which win.

    Raises:
        ConfigurationError: If as many names as tensors are not given.
    """
    if given is not None:
        return _given("Inputs(names=)", given, len(paths))
    parameters = _parameters(forward)
    return _unique([_call_path(path, parameters) for path in paths], "input")


def output_names(
    paths: Sequence[Path], taken: Sequence[str], given: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """Name the tensors of a result, none like an input's name.

    A single tensor is ``output``, those of a tuple ``output_0``, ``output_1`` and so on; mappings,
    named tuples and dataclasses give their keys.

    Args:
        paths: For each tensor, its path in the result.
        taken: Names of the inputs.
        given: Names from the user, which win.

    Raises:
        ConfigurationError: If as many names as tensors are not given.
    """
    if given is not None:
        return _given("Inputs(output_names=)", given, len(paths))
    names = _unique([("output", *path) for path in paths], "output")
    apart = [f"{name}_out" if name in taken else name for name in names]
    return tuple(_numbered(apart, taken))


def _given(argument: str, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    if len(names) != count or len(set(names)) != count:
        raise ConfigurationError(
            f"{argument} must hold {count} different names, one per tensor; got {names!r}."
        )
    return names


def _parameters(forward: Callable[..., Any]) -> tuple[list[str], str | None]:
    """Return the names of positional parameters and of ``*args``."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # builtins and some C functions have no signature
        return [], None
    positional = [
        p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
    ]
    return positional, next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)


def _call_path(path: Path, parameters: tuple[list[str], str | None]) -> Path:
    """Turn ``(0, i, ...)`` and ``(1, name, ...)`` into ``(parameter, ...)``."""
    where, key, *rest = path
    if where == 1:
        return (key, *rest)
    positional, variadic = parameters
    if key < len(positional):
        return (positional[key], *rest)
    return (variadic or "input", key - len(positional), *rest)


def _unique(paths: Sequence[Path], fallback: str) -> tuple[str, ...]:
    short = [_join(_tail(path), fallback) for path in paths]
    full = [_join(path, fallback) for path in paths]
    names = [f if short.count(s) > 1 else s for s, f in zip(short, full, strict=True)]
    return tuple(_numbered(names))


def _tail(path: Path) -> Path:
    """Return the last named key and the indices that follow it."""
    named = [place for place, key in enumerate(path) if isinstance(key, str)]
    return path[named[-1] :] if named else path


def _join(path: Path, fallback: str) -> str:
    name = re.sub(r"\W+", "_", "_".join(str(key) for key in path), flags=re.ASCII).strip("_")
    if not name:
        return fallback
    return f"{fallback}_{name}" if name[0].isdigit() else name


def _numbered(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    used = set(taken)
    result = []
    for name in names:
        unique, number = name, 1
        while unique in used:
            unique, number = f"{name}_{number}", number + 1
        used.add(unique)
        result.append(unique)
    return result
