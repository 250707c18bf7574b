"""What a core is asked for and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from onnxport.exporter.flat import FlatModule
    from onnxport.signature import Axes

__all__ = ["Core", "ExportRequest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """One module to export.

    Args:
        module: Takes and gives flat tensors, on the CPU, in eval mode.
        args: Example tensors; no dynamic axis has size 0 or 1, and none has the size of another.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.
        input_axes: The dynamic axes of each input.
        output_axes: The dynamic axes of each output.
        opset: ONNX opset version.
    """

    module: FlatModule
    args: tuple[torch.Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    input_axes: Axes
    output_axes: Axes
    opset: int


class Core(Protocol):
    """A way from a module to a graph."""

    @property
    def name(self) -> str:
        """``"dynamo"``, ``"trace"`` or ``"script"``."""
        ...

    @property
    def variant(self) -> str:
        """How the core is asked, in a word or two, or ``""``."""
        ...

    def export(self, request: ExportRequest) -> ir.Model:
        """Return the graph; any exception means that this core cannot."""
        ...
