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

    Attributes:
        keeps_state: Whether a run changes the module, so that every run needs a fresh start.
    """

    def __init__(self, module: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.keeps_state = False
        self.training = module.training

    @override
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors of the result, in tree order; other values of it are left out."""
        return tuple(tensor for _, tensor in self.run_nested(tensors))

    def result_paths(self, tensors: tuple[torch.Tensor, ...]) -> list[Path]:
        """Run once and return where each tensor of the result stands."""
        return [path for path, _ in self.run_nested(tensors)]

    def weight_names(self, root: nn.Module) -> dict[str, str]:
        """Return by which names the weights are known in a module that shares them.

        Args:
            root: The module whose ``state_dict`` is the checkpoint's.

        Returns:
            Name in this module -> name in ``root``; weights that it does not have are left out.
        """
        known: dict[int, list[str]] = {}
        for name, submodule in root.named_modules(remove_duplicate=False):
            known.setdefault(id(submodule), []).append(f"{name}." if name else "")
        names: dict[str, str] = {}
        for ours, submodule in self.named_modules(remove_duplicate=False):
            theirs = known.get(id(submodule), [])
            if theirs:
                # A module with two names keeps, under each, the one that it ends with.
                best = next((name for name in theirs if f"{ours}.".endswith(name)), theirs[0])
                own = {**submodule._parameters, **submodule._buffers}  # noqa: SLF001 - own ones
                names |= {f"{ours}.{key}": best + key for key in own}
        return names

    def run_nested(self, tensors: tuple[torch.Tensor, ...]) -> list[tuple[Path, torch.Tensor]]:
        """Run once and return the tensors of the result with their paths.

        A result that is a number and no tensor (a size, say) becomes a scalar.
        """
        args, kwargs = rebuild(self.spec, tensors, fresh=True)
        result: Any = self.module(*args, **kwargs)
        if isinstance(result, (int, float, torch.SymInt, torch.SymFloat)):
            result = _scalar(result)
        return flatten(result)[1]


def _scalar(value: Any) -> torch.Tensor:
    if isinstance(value, bool):
        return torch.scalar_tensor(value, dtype=torch.bool)
    whole = isinstance(value, (int, torch.SymInt))
    return torch.scalar_tensor(value, dtype=torch.int64 if whole else torch.float32)
