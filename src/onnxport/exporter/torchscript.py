"""The TorchScript core: trace, and script for control flow that depends on data or sizes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass

from onnxport._torch_compat import MAX_TORCHSCRIPT_OPSET
from onnxport.exporter.control_flow import scripted_parts
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.scripting import script
from onnxport.exporter.target import FunctionModule

if TYPE_CHECKING:
    from onnxport.exporter.base import ExportRequest

__all__ = ["ScriptCore", "TraceCore"]


@dataclass(frozen=True, slots=True)
class TraceCore:
    """Records the operators of one run; Python control flow is frozen as that run took it.

    Args:
        scripted: Compile the submodules that branch first, so that their control flow stays.
    """

    scripted: bool = False
    name: str = "trace"

    @property
    def variant(self) -> str:
        """``"branching parts scripted"`` or ``""``."""
        return "branching parts scripted" if self.scripted else ""

    def export(self, request: ExportRequest) -> ir.Model:
        """Return the traced graph.

        Raises:
            RuntimeError: If parts should be compiled and there is none that can be.
        """
        if not self.scripted:
            return _export(request, request.module)
        with scripted_parts(request.module) as count:
            if count == 0:
                raise RuntimeError("no submodule that branches can be compiled by torch.jit.script")
            return _export(request, _traced(request.module, request.args))


@dataclass(frozen=True, slots=True)
class ScriptCore:
    """Compiles the module's source, so that branches and loops stay branches and loops.

    The flat wrapper around it is traced: a scripted module inside a trace keeps its control flow.
    """

    name: str = "script"
    variant: str = ""

    def export(self, request: ExportRequest) -> ir.Model:
        """Return the scripted graph.

        Raises:
            TypeError: If a method or a function is exported, which no module's source holds.
        """
        if isinstance(request.module.module, FunctionModule):
            raise TypeError("a method or function as target is no module that script can compile")
        scripted = script(request.module.module)
        flat = FlatModule(scripted, request.module.spec)
        return _export(replace(request, module=flat), _traced(flat, request.args))


def _traced(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.nn.Module:
    # torch.onnx's own tracer does not take scripted modules, so trace first.
    return torch.jit.trace(module, args, check_trace=False)  # type: ignore[no-any-return, no-untyped-call]


def _export(request: ExportRequest, module: torch.nn.Module) -> ir.Model:
    axes = dict(zip(request.input_names, request.input_axes, strict=True)) | dict(
        zip(request.output_names, request.output_axes, strict=True)
    )
    with tempfile.TemporaryDirectory(prefix="onnxport-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            request.args,
            str(path),  # a Path counts as a buffer, which takes 2 GB at most (torch 2.13)
            dynamo=False,
            dynamic_axes={name: dims for name, dims in axes.items() if dims},
            input_names=list(request.input_names),
            output_names=list(request.output_names),
            opset_version=min(request.opset, MAX_TORCHSCRIPT_OPSET),
            # Folding and the merging of equal weights look at values, which the next checkpoint
            # has not; this keeps the exporter from both.
            do_constant_folding=False,
            keep_initializers_as_inputs=True,
            verbose=False,
        )
        # External data (past 2 GB) lie in the temporary folder: bring them into memory.
        model = _in_memory(ir.load(path))
    _keep_weights_inside(model.graph)
    # This core writes the shapes of inputs and outputs only. The pass takes sequences for tensors.
    return model if _has_sequences(model) else ShapeInferencePass()(model).model


def _has_sequences(model: ir.Model) -> bool:
    kinds = {node.op_type for node in model.graph.all_nodes()}
    return any("Sequence" in kind or kind.startswith("Optional") for kind in kinds)


def _keep_weights_inside(graph: ir.Graph) -> None:
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    graph.inputs.clear()
    graph.inputs.extend(inputs)


def _in_memory(model: ir.Model) -> ir.Model:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            tensor = value.const_value
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
    return model
