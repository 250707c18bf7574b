"""Which execution providers really run here, and which of them a model is proven on."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch

from onnxport.validation.session import CPU, Session, available_providers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["idle_providers", "providers_on_request", "resolve_providers"]

_ACCELERATORS = (
    "CUDAExecutionProvider",
    "ROCMExecutionProvider",
    "CoreMLExecutionProvider",
    "DmlExecutionProvider",
    "OpenVINOExecutionProvider",
)
"""What "auto" proves on besides the CPU, where it really runs."""

_COMPILERS = (
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "MIGraphXExecutionProvider",
)
"""What compiles for minutes, and again for other sizes: proven on where it is asked for."""

_PROBE_MB = 64

logger = logging.getLogger(__name__)


def resolve_providers(wanted: Literal["auto"] | Sequence[str]) -> tuple[str, ...]:
    """Return the execution providers to prove on.

    Args:
        wanted: ``"auto"``: CPU and each accelerator provider that can really run a graph here, but
            those that compile for minutes; or names, which are taken as they are (a session that
            cannot use one fails).
    """
    if wanted != "auto":
        return tuple(wanted)
    return (CPU, *(name for name in _listed(_ACCELERATORS) if _really_runs(name)))


def idle_providers() -> tuple[str, ...]:
    """Return the accelerator providers that the package holds and that cannot run here."""
    return tuple(name for name in _listed(_ACCELERATORS) if not _really_runs(name))


def providers_on_request() -> tuple[str, ...]:
    """Return the providers that really run here and that are proven on only when asked for."""
    return tuple(name for name in _listed(_COMPILERS) if _really_runs(name))


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    available = available_providers()
    return tuple(name for name in names if name in available)


@lru_cache
def _really_runs(provider: str) -> bool:
    """Run a one-node graph: a listed provider may lack its device or libraries."""
    import onnx

    shape = [1]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    try:
        session = Session(model.SerializeToString(), provider, gpu_memory_mb=_PROBE_MB)
        session.run(("x",), (torch.ones(1),))
    except Exception as error:  # noqa: BLE001 - each provider fails in its own way
        logger.info("%s is listed by ONNX Runtime but does not run here: %s", provider, error)
        return False
    return True
