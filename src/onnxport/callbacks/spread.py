"""The weights of a module that may be spread over processes, wherever a framework keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxport.callbacks.adapter import bare, weights_of
from onnxport.exporter.unsharded import gathered, is_flattened, is_spread, whole_module

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["IN_PARTS", "Spread", "is_in_parts"]

IN_PARTS = (
    "Each process has a part of the weights, which are put together only for Lightning and Fabric. "
    "Call onnxport.export with the whole module at the end."
)


def is_in_parts(module: nn.Module) -> bool:
    """Tell whether each process has a part of a module's weights only: of FSDP, or DeepSpeed."""
    parameters = dict(module.named_parameters())
    of_deepspeed = any(hasattr(each, "ds_id") for each in parameters.values())
    return is_flattened(module) or is_spread(parameters) or of_deepspeed


class Spread:
    """A module in training.

    Args:
        module: The module, without wrappers.
        wrapped: What is called in training: the module, or a wrapper of several processes.

    Attributes:
        is_spread: Whether each process has a part of the weights only.
    """

    def __init__(self, module: nn.Module, wrapped: nn.Module) -> None:
        self._module, self._wrapped = module, wrapped
        # Once: it is asked at each step, and looks at each parameter.
        self._is_flat = is_flattened(wrapped)
        self.is_spread = self._is_flat or is_spread(dict(module.named_parameters()))

    def is_in(self, content: Mapping[str, Any]) -> bool:
        """Tell whether somebody saves the weights of the module.

        Args:
            content: What is saved.
        """
        if any(bare(value) is self._module for value in content.values()):
            return True
        return not self.is_spread and weights_of(content, self._module) is not None

    def state(self, content: Mapping[str, Any] | None = None, *, first: bool) -> Mapping[str, Any]:
        """Return whole weights, in the first process; all processes must ask.

        Args:
            content: What is saved; default: the weights as they are.
            first: This is the first process.
        """
        if not self.is_spread:
            saved = None if content is None else weights_of(content, self._module)
            return dict(self._module.state_dict()) if saved is None else saved
        if self._is_flat:
            from torch.distributed.checkpoint.state_dict import get_model_state_dict

            return gathered(dict(get_model_state_dict(self._wrapped)), keep=first)
        return gathered(dict(self._module.state_dict()), keep=first)

    def whole(self, state: Mapping[str, Any]) -> nn.Module | None:
        """Return what stands for the module where that takes all processes; ``None``: nothing.

        Args:
            state: Whole weights.
        """
        return whole_module(self._module, state, flat=self._is_flat) if self.is_spread else None
