"""The module in training as the source of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxport.exporter.module_state import copy_module, load_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["LiveModule"]


@dataclass(frozen=True, slots=True)
class LiveModule:
    """A module in training with the weights of a checkpoint; copied when it is asked for.

    Args:
        live: The module; it is never changed.
        saved: The checkpoint's ``state_dict``.
        idle: Hooks that a copy can do without.
    """

    live: nn.Module
    saved: Mapping[str, Any]
    idle: tuple[Any, ...] = ()

    def state(self) -> Mapping[str, Any]:
        """Return the checkpoint's ``state_dict``."""
        return self.saved

    def module(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Return a copy with the checkpoint's weights."""
        copy = copy_module(self.live, without=self.idle)
        return copy, load_weights(copy, self.saved)
