"""Name the submodule that stays random in eval mode."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnxport._torch_compat import export_context
from onnxport.exporter.global_state import preserved_globals
from onnxport.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

__all__ = ["first_random_module", "reseed"]

_OTHER_SEED = 20_071


def first_random_module(module: nn.Module, tensors: Sequence[torch.Tensor]) -> str:
    """Return `` (first in 'name', a Kind)`` for the innermost module whose result is random.

    Args:
        module: A module in flat form, on a copy that belongs to the export.
        tensors: Its inputs.

    Returns:
        ``""`` when no submodule can be told.
    """
    with preserved_globals(), export_context():
        first = _results(module, tensors)
        reseed()
        second = _results(module, tensors)
    for (name, kind, before), (_, _, after) in zip(first, second, strict=False):
        if name and not _same(before, after):
            return f" (first in {name.removeprefix('module.')!r}, a {kind})"
    return ""


def reseed() -> None:
    """Give every global stream of random numbers another state; to be used where it is restored."""
    torch.manual_seed(_OTHER_SEED)
    np.random.seed(_OTHER_SEED)  # noqa: NPY002
    random.seed(_OTHER_SEED)


def _results(module: nn.Module, tensors: Sequence[torch.Tensor]) -> list[tuple[str, str, Any]]:
    """Run once and note the result of each submodule, in the order in which they finish."""
    seen: list[tuple[str, str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(submodule: nn.Module, _: Any, result: Any) -> None:
            values = [tensor.detach().clone() for _, tensor in flatten(result)[1]]
            seen.append((name, type(submodule).__name__, values))

        return hook

    handles = [
        submodule.register_forward_hook(note(name))
        for name, submodule in module.named_modules()
        if name != "module" and not isinstance(submodule, torch.jit.ScriptModule)
    ]
    try:
        module(*tensors)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(before, after, strict=True)
    )
