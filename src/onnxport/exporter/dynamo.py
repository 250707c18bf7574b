"""The dynamo core: ``torch.export``, then translation operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from onnxport._torch_compat import operators_read_once
from onnxport.exporter.symbolic import optimize_symbolically

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxport.exporter.base import ExportRequest

__all__ = ["DynamoCore"]


@dataclass(frozen=True, slots=True)
class DynamoCore:
    """Exports through ``torch.onnx.export(dynamo=True)``.

    Args:
        automatic: Ask for ``Dim.AUTO`` instead of ``Dim.DYNAMIC``. AUTO lets a module that
            constrains a size come out, and specialises silently where it must: the proof at other
            sizes tells.
        optimize: Optimise the graph, which is the cause of some failures; without a look at the
            values of the weights, so that the graph is right for those of the next checkpoint, too.
    """

    automatic: bool = False
    optimize: bool = True
    name: str = "dynamo"

    @property
    def variant(self) -> str:
        """How it differs from the plain core, in words."""
        words = {"automatic dims": self.automatic, "not optimised": not self.optimize}
        return ", ".join(word for word, said in words.items() if said)

    def export(self, request: ExportRequest) -> ir.Model:
        """Return the graph.

        Raises:
            RuntimeError: If torch returns nothing, which its types allow.
        """
        with operators_read_once():
            program = torch.onnx.export(
                request.module,
                request.args,
                dynamo=True,
                dynamic_shapes=(tuple(self._dims(axes) for axes in request.input_axes),),
                input_names=list(request.input_names),
                output_names=list(request.output_names),
                opset_version=request.opset,
                optimize=False,
                verbose=False,
            )
        if program is None:
            raise RuntimeError("torch.onnx.export(dynamo=True) returned no program")
        if self.optimize:
            optimize_symbolically(program.model, request.module.state_dict().keys())
        return program.model

    def _dims(self, axes: dict[int, str]) -> dict[int, Any]:
        if self.automatic:
            return dict.fromkeys(axes, torch.export.Dim.AUTO)
        return dict(axes)
