"""Keep what a module changes in itself when it runs (a counter, a cache, a table) from lasting."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from onnxport.exporter.module_state import borrowed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

__all__ = ["attributes_read", "isolated", "plain_attributes", "watched"]

T = TypeVar("T")


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Run the block on copies of a module's attributes and buffers, and put the originals back."""
    with torch.no_grad():
        clones = {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    with borrowed(module, clones):
        yield


def watched(module: nn.Module, run: Callable[[], T]) -> tuple[T, bool]:
    """Run once without a trace, and tell whether it would have left the module other than it was.

    Args:
        module: The module.
        run: Runs it.

    Returns:
        What the run gave, and whether it changed the module.
    """
    with isolated(module):
        before = _fingerprint(module)
        result = run()
        return result, before != _fingerprint(module)


def attributes_read(module: nn.Module, run: Callable[[], object]) -> frozenset[str]:
    """Return which attributes of a module and its parts a run looks at, as ``<part>.<name>``."""
    seen: set[str] = set()
    kinds = [(part, type(part)) for part in module.modules()]
    try:
        for name, part in module.named_modules():
            part.__class__ = _watching(type(part), f"{name}." if name else "", seen)
        run()
    finally:
        for part, kind in kinds:
            part.__class__ = kind
    return frozenset(seen)


def plain_attributes(module: nn.Module) -> frozenset[str]:
    """Return the attributes of a module and its parts that hold no tensor, as above."""
    return frozenset(
        f"{name}.{key}" if name else key
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if not isinstance(value, torch.Tensor)
    )


def _watching(kind: type[nn.Module], prefix: str, seen: set[str]) -> type[nn.Module]:
    def look(self: nn.Module, name: str) -> Any:
        seen.add(prefix + name)
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": look, "__module__": kind.__module__})


def _fingerprint(module: nn.Module) -> list[Any]:
    return [
        (name, _mark(value))
        for submodule in module.modules()
        for name, value in sorted(vars(submodule).items())
    ]


def _mark(value: Any) -> Any:
    """Which object, and how often or how far it was changed; the content itself is not read."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version, tuple(value.shape)  # noqa: SLF001 - counts in-place changes
    if isinstance(value, dict):
        return [(str(key), _mark(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [_mark(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)
