"""A module that takes tensors and gives tensors, around one that takes and gives anything.

Both cores see the same thing: positional tensors in, a tuple of tensors out. Constants of the call
are baked in, containers are rebuilt inside, results are flattened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from onnxport.tree import flatten, rebuild

if TYPE_CHECKING:
    from onnxport.tree import Path, Spec

__all__ = ["PREFIX", "FlatModule"]

PREFIX = "module."
"""What the wrapper puts before the names of parameters."""


class FlatModule(nn.Module):
    """Calls a module with the structure of one observed call.

    Args:
        module: The module to wrap; in eval mode.
        spec: Structure of ``(args, kwargs)``, see :func:`onnxport.tree.flatten`.
    """

    def __init__(self, module: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.training = module.training

    @override
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the result, in tree order; other values of it are left out."""
        args, kwargs = rebuild(self.spec, tensors)
        _, found = flatten(self.module(*args, **kwargs))
        return tuple(tensor for _, tensor in found)

    def result_paths(self, tensors: tuple[torch.Tensor, ...]) -> list[Path]:
        """Run once and return where each tensor of the result stands."""
        return [path for path, _ in self.run_nested(tensors)]

    def run_nested(self, tensors: tuple[torch.Tensor, ...]) -> list[tuple[Path, torch.Tensor]]:
        """Run once and return the tensors of the result with their paths."""
        args, kwargs = rebuild(self.spec, tensors)
        result: Any = self.module(*args, **kwargs)
        return flatten(result)[1]
