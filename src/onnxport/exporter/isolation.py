"""Keep what a module changes in itself when it runs (a counter, a cache, a table) from lasting."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from onnxport.exporter.module_state import borrowed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

__all__ = ["changes_itself", "isolated"]


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Run the block on copies of a module's attributes and buffers, and put the originals back."""
    with torch.no_grad():
        clones = {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    with borrowed(module, clones):
        yield


def changes_itself(module: nn.Module, tensors: Sequence[torch.Tensor]) -> bool:
    """Tell whether a run leaves a module other than it was, by one run that leaves no trace."""
    with isolated(module):
        before = _fingerprint(module)
        module(*(tensor.clone() for tensor in tensors))
        return before != _fingerprint(module)


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
