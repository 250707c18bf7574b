"""ONNX Runtime: which execution providers really run, and a session that says what it got."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from onnxport._optional import is_available, optional_import
from onnxport.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnxport.report import Check

__all__ = [
    "CPU",
    "PrepSessions",
    "Session",
    "idle_providers",
    "require_runtime",
    "resolve_providers",
    "runtime_version",
]

CPU = "CPUExecutionProvider"
_ACCELERATORS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "CoreMLExecutionProvider")
_BOOL = 9
"""``TensorProto.BOOL``."""
_QUIET = 4
"""ONNX Runtime's log severity "fatal": what matters is raised or returned."""

logger = logging.getLogger(__name__)


def _runtime() -> Any:
    with optional_import(extra="ort", needed_for="Proving a model"):
        import onnxruntime
    return onnxruntime


def require_runtime(*, here: bool = True) -> None:
    """Fail early when ONNX Runtime is not installed.

    Args:
        here: Whether it will be used in this process; if not, it is looked for and not imported.

    Raises:
        MissingDependencyError: With the command that installs it.
    """
    if here or not is_available("onnxruntime"):
        _runtime()


def runtime_version() -> str:
    """Return ONNX Runtime's version."""
    return str(_runtime().__version__)


def resolve_providers(wanted: Literal["auto"] | Sequence[str]) -> tuple[str, ...]:
    """Return the execution providers to prove on.

    Args:
        wanted: ``"auto"``: CPU and each accelerator provider that can really run a graph here;
            or names, which are taken as they are (a session that cannot use one fails).
    """
    if wanted != "auto":
        return tuple(wanted)
    available = _runtime().get_available_providers()
    return (CPU, *(name for name in _ACCELERATORS if name in available and _really_runs(name)))


def idle_providers() -> tuple[str, ...]:
    """Return the accelerator providers that the package holds and that cannot run here."""
    available = _runtime().get_available_providers()
    return tuple(name for name in _ACCELERATORS if name in available and not _really_runs(name))


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
        session = Session(model.SerializeToString(), provider)
        session.run(("x",), (torch.ones(1),))
    except Exception as error:  # noqa: BLE001 - each provider fails in its own way
        logger.info("%s is listed by ONNX Runtime but does not run here: %s", provider, error)
        return False
    return True


_THREADS: list[int] = []
"""How many threads sessions use in this process; empty: as many as ONNX Runtime likes."""


def use_threads(count: int) -> None:
    """Let all sessions of this process use so many threads, and let these sleep when idle."""
    _THREADS[:] = [count]


class Session:
    """A model loaded in ONNX Runtime on one provider.

    Args:
        model: Path or serialised bytes of the model.
        provider: Execution provider, which must really be used.
        in_place: Use the weights where they lie, and the graph as it is. By default weights are
            fused and laid out anew, which needs a second copy of them and pays after many runs.
        spare: Threads that are idle besides, where :func:`use_threads` has set how many there are.

    Raises:
        VerificationError: If the model does not load, or another provider is used instead.
    """

    def __init__(
        self, model: Path | bytes, provider: str = CPU, *, in_place: bool = False, spare: int = 0
    ) -> None:
        ort = _runtime()
        if provider not in ort.get_available_providers():
            raise VerificationError(_not_used(provider, ort.get_available_providers()))
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        if _THREADS:
            options.intra_op_num_threads = _THREADS[-1] + spare
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if in_place:
            options.add_session_config_entry("session.disable_prepacking", "1")
            # Fusions make new weights out of those that are there.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = False  # an arena is never given back
        providers = [provider] if provider == CPU else [(provider, _exact(provider)), CPU]
        try:
            self._session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=providers,
                enable_fallback=0,  # to the CPU, in silence and for good
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common public base
            raise VerificationError(f"ONNX Runtime does not load the model: {error}") from error
        used = self._session.get_providers()
        if provider not in used:
            raise VerificationError(_not_used(provider, used))
        self.provider = provider

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that the graph really has, in order."""
        return tuple(node.name for node in self._session.get_inputs())

    def run(
        self,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor | np.ndarray[Any, Any]],
        checks: tuple[Check, ...] = (),
    ) -> list[torch.Tensor]:
        """Run once.

        Args:
            names: Name of each tensor; those that the graph does not have are left out.
            tensors: The inputs; arrays need not be aligned, as they lie in a file.
            checks: Checks made so far, for the error.

        Raises:
            VerificationError: If ONNX Runtime fails.
        """
        wanted = set(self.input_names)
        try:
            feeds = {
                name: self._ort_value(tensor)
                for name, tensor in zip(names, tensors, strict=True)
                if name in wanted
            }
            values = self._session.run_with_ort_values(None, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common public base
            raise VerificationError(f"ONNX Runtime fails: {_short(error)}", checks) from error
        results = [_to_torch(value) for value in values]
        # An output that is an input comes back as the same memory, which is not the caller's.
        fed = {value.data_ptr() for value in feeds.values()}
        return [result.clone() if result.data_ptr() in fed else result for result in results]

    def _ort_value(self, tensor: torch.Tensor | np.ndarray[Any, Any]) -> Any:
        ort = _runtime()
        if isinstance(tensor, np.ndarray):
            if tensor.dtype.name == "bfloat16":
                raw = tensor.view(np.int16)
                return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, 16)
            return ort.OrtValue.ortvalue_from_numpy(tensor)
        if tensor.dtype is torch.bfloat16:
            raw = tensor.contiguous().view(torch.int16).numpy()
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, 16)
        return ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


class PrepSessions:
    """Runs small graphs, and keeps a session for each of them.

    Graphs of one structure are the same bytes, and share a session.
    """

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}

    def __call__(
        self, model: bytes, names: Sequence[str], tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run a serialised graph: names and tensors of its inputs -> its outputs."""
        if model not in self._sessions:
            self._sessions[model] = Session(model, in_place=True)
        return self._sessions[model].run(names, tensors)


def _not_used(provider: str, used: Sequence[str]) -> str:
    return (
        f"ONNX Runtime was asked for {provider} and has {', '.join(used)} instead. "
        "Install the ONNX Runtime package for this device, or ask for other providers."
    )


def _exact(provider: str) -> dict[str, str]:
    # TF32 keeps 10 bits of the mantissa: the proof is about the graph, not about that choice.
    return {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}


def _to_torch(value: Any) -> torch.Tensor:
    """Take over a result: nothing is copied, for it may be as large as a weight."""
    if value.element_type() == _BOOL:  # DLPack's consumers do not agree on what it is
        array = np.array(value.numpy(), copy=True)
        return torch.from_numpy(array.reshape(-1)).reshape(array.shape)
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())  # noqa: SLF001
    return tensor


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
