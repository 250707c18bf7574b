"""The TorchScript core: trace, and script for control flow that depends on data or sizes."""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from onnxport._torch_compat import MAX_TORCHSCRIPT_OPSET
from onnxport.exporter.flat import FlatModule

if TYPE_CHECKING:
    from onnxport.exporter.base import ExportRequest

__all__ = ["ScriptCore", "TraceCore"]


@dataclass(frozen=True, slots=True)
class TraceCore:
    """Records the operators of one run; Python control flow is frozen as that run took it."""

    name: str = "trace"
    variant: str = ""

    def export(self, request: ExportRequest) -> ir.Model:
        """Return the traced graph."""
        return _export(request, request.module)


@dataclass(frozen=True, slots=True)
class ScriptCore:
    """Compiles the module's source, so that branches and loops stay branches and loops.

    The flat wrapper around it is traced: a scripted module inside a trace keeps its control flow.
    """

    name: str = "script"
    variant: str = ""

    def export(self, request: ExportRequest) -> ir.Model:
        """Return the scripted graph."""
        scripted = torch.jit.script(_without_raising_properties(request.module.module))
        flat = FlatModule(scripted, request.module.spec)
        traced = torch.jit.trace(flat, request.args, check_trace=False)  # type: ignore[no-untyped-call]
        return _export(replace(request, module=flat), traced)


def _without_raising_properties(module: torch.nn.Module) -> torch.nn.Module:
    """Hide properties that cannot be read, in place, on a copy that belongs to the export.

    The script compiler reads every attribute, ``forward`` uses it or not, and a property that
    raises (one that needs a trainer, say) would end it.
    """
    for submodule in module.modules():
        hidden = {name: None for name in _properties(type(submodule)) if _raises(submodule, name)}
        if hidden:
            kind = type(submodule)
            submodule.__class__ = type(kind.__name__, (kind,), hidden | {"__doc__": kind.__doc__})
    return module


def _properties(kind: type) -> list[str]:
    return [name for name, value in inspect.getmembers_static(kind) if isinstance(value, property)]


def _raises(module: torch.nn.Module, name: str) -> bool:
    try:
        getattr(module, name)
    except AttributeError:
        return False  # the compiler takes it for missing
    except Exception:  # noqa: BLE001 - a property is user code
        return True
    return False


def _export(request: ExportRequest, module: torch.nn.Module) -> ir.Model:
    axes = dict(zip(request.input_names, request.input_axes, strict=True)) | dict(
        zip(request.output_names, request.output_axes, strict=True)
    )
    with tempfile.TemporaryDirectory(prefix="onnxport-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            request.args,
            path,
            dynamo=False,
            dynamic_axes={name: dims for name, dims in axes.items() if dims},
            input_names=list(request.input_names),
            output_names=list(request.output_names),
            opset_version=min(request.opset, MAX_TORCHSCRIPT_OPSET),
            verbose=False,
        )
        # External data (past 2 GB) lie in the temporary folder: bring them into memory.
        return _in_memory(ir.load(path))


def _in_memory(model: ir.Model) -> ir.Model:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            tensor = value.const_value
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=tensor.name)
    return model
