"""ONNX Runtime: a session on one execution provider, which says what it got."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from onnxport._optional import is_available, optional_import
from onnxport.errors import ProviderError
from onnxport.validation.provider_options import is_out_of_memory, memory_limit, options_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from onnxport.report import Check

__all__ = [
    "CPU",
    "PlacedNode",
    "PrepSessions",
    "Session",
    "available_providers",
    "require_runtime",
    "runtime_version",
]

CPU = "CPUExecutionProvider"
_BOOL = 9
"""``TensorProto.BOOL``."""
_LONGEST = 600
"""Characters of what ONNX Runtime says."""
_QUIET = 4
"""ONNX Runtime's log severity "fatal": what matters is raised or returned."""


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


def available_providers() -> tuple[str, ...]:
    """Return the execution providers that the installed package holds, whether they run or not."""
    return tuple(_runtime().get_available_providers())


_THREADS: list[int] = []
"""How many threads sessions use in this process; empty: as many as ONNX Runtime likes."""


def use_threads(count: int) -> None:
    """Let all sessions of this process use so many threads, and let these sleep when idle."""
    _THREADS[:] = [count]


class PlacedNode(NamedTuple):
    """A node of a graph, and the execution provider that has taken it."""

    provider: str
    operator: str
    name: str


class Session:
    """A model loaded in ONNX Runtime on one provider.

    Args:
        model: Path or serialised bytes of the model.
        provider: Execution provider, which must really be used.
        in_place: Use the weights where they lie, and the graph as it is. By default weights are
            fused and laid out anew, which needs a second copy of them and pays after many runs.
        spare: Threads that are idle besides, where :func:`use_threads` has set how many there are.
        gpu_memory_mb: What the provider may take of a GPU's memory, in MiB; ``None``: a part of
            what is free now.

    Raises:
        ProviderError: If the model does not load, or another provider is used instead.
    """

    def __init__(
        self,
        model: Path | bytes,
        provider: str = CPU,
        *,
        in_place: bool = False,
        spare: int = 0,
        gpu_memory_mb: int | None = None,
    ) -> None:
        ort = _runtime()
        if provider not in ort.get_available_providers():
            raise ProviderError(_not_used(provider, ort.get_available_providers()))
        threads = _THREADS[-1] + spare if _THREADS else None
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        else:
            # After a run its threads would take cores from whoever runs next, training included.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if in_place:
            options.add_session_config_entry("session.disable_prepacking", "1")
            # Fusions make new weights out of those that are there.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = False  # an arena is never given back
        told = options_for(provider, threads=threads, memory=memory_limit(provider, gpu_memory_mb))
        providers = [provider] if provider == CPU else [(provider, told), CPU]
        with _refusals(provider, "ONNX Runtime does not load the model"):
            self._session: Any = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=providers,
                enable_fallback=0,  # to the CPU, in silence and for good
            )
        used = self._session.get_providers()
        if provider not in used:
            raise ProviderError(_not_used(provider, used))
        self.provider = provider

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that the graph really has, in order."""
        return tuple(node.name for node in self._session.get_inputs())

    def close(self) -> None:
        """Give the memory back; an error that is kept would keep its frames, and the session."""
        self._session = None

    def placed(self) -> tuple[PlacedNode, ...]:
        """Return which provider has taken which node of the graph.

        ONNX Runtime notes it when it divides the graph, after it has folded constants and before
        providers fuse what they have taken into nodes of their own. An ONNX Runtime that keeps no
        such notes gives no nodes.
        """
        notes = getattr(self._session, "get_provider_graph_assignment_info", None)
        return tuple(
            PlacedNode(provider=part.ep_name, operator=node.op_type, name=node.name)
            for part in (notes() if notes is not None else ())
            for node in part.get_nodes()
        )

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
            ProviderError: If ONNX Runtime fails.
        """
        wanted = set(self.input_names)
        with _refusals(self.provider, "ONNX Runtime fails", checks):
            feeds = {
                name: self._ort_value(tensor)
                for name, tensor in zip(names, tensors, strict=True)
                if name in wanted
            }
            values = self._session.run_with_ort_values(None, feeds)
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


def _to_torch(value: Any) -> torch.Tensor:
    """Take over a result: nothing is copied, for it may be as large as a weight."""
    if value.element_type() == _BOOL:  # DLPack's consumers do not agree on what it is
        array = np.array(value.numpy(), copy=True)
        return torch.from_numpy(array.reshape(-1)).reshape(array.shape)
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())  # noqa: SLF001
    return tensor


@contextmanager
def _refusals(provider: str, what: str, checks: tuple[Check, ...] = ()) -> Iterator[None]:
    """Say why a session cannot be made or run; and whether its device had too little memory.

    Raises:
        ProviderError: If the block fails.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions have no common public base
        # A traceback keeps the session, and its memory, for as long as the error is kept.
        error.with_traceback(None)
        text = " ".join(str(error).split())
        if provider != CPU and is_out_of_memory(text):
            advice = "Verify(gpu_memory_mb=) says how much it may take."
            raise ProviderError(
                f"{what}: too little memory. {advice} {_gist(text)}", checks, out_of_memory=True
            ) from error
        raise ProviderError(f"{what}: {_gist(text)}", checks) from error


def _gist(text: str) -> str:
    """Shorten a message: OpenVINO names the operator at its end, the others at the beginning."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
