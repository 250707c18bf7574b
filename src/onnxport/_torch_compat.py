"""The only place that touches what torch keeps private or changes between releases."""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch._decomp import decomposition_table
from torch._subclasses import fake_tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from typing_extensions import override

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

__all__ = [
    "DEFAULT_OPSET",
    "FAKE_TENSOR_LIMITS",
    "MAX_TORCHSCRIPT_OPSET",
    "WRAPPERS",
    "CapturedOutput",
    "ReadOnly",
    "WriteAttemptedError",
    "captured_output",
    "compiled_graphs",
    "decomposed",
    "export_context",
    "fake_tensors",
    "forget_half_compiled_types",
    "gathered_shards",
    "is_compiled_forward",
    "operators_read_once",
    "plain_name",
    "rewritten_sources",
    "unwrapped",
    "without_modes",
]

DEFAULT_OPSET = 20
"""What torch 2.13 writes by default; ONNX Runtime reads it since 1.17."""

MAX_TORCHSCRIPT_OPSET = 20
"""The TorchScript core knows no newer opset (torch 2.13, ``torch.onnx._constants``)."""

logger = logging.getLogger(__name__)


@contextmanager
def export_context() -> Iterator[None]:
    """Run eager reference passes and exports under the same, exportable conditions.

    No gradients, no autocast, and no fused transformer fast path:
    ``aten::_transformer_encoder_layer_fwd`` has no ONNX form, and the fast path zeroes padded
    rows, which the plain path does not (pytorch/pytorch#177013, #97111). Everything is put back.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


_MAX_CAPTURED = 4_000_000
"""Characters of output that are kept of one export."""


@dataclass(slots=True)
class CapturedOutput:
    """What was printed in a block; complete when the block was left.

    Args:
        text: Everything that Python and C++ wrote, and every warning with its file and line.
    """

    text: str = ""


@contextmanager
def captured_output() -> Iterator[CapturedOutput]:
    """Keep what exporters print, from Python and from C++, out of the user's terminal.

    A failed TorchScript export prints its whole graph to file descriptor 1 from C++, and dynamo
    logs the code that it gave up on. What is printed in the block goes to the debug log. Warnings
    are printed there too: the tracer's name the line of a branch that it froze.
    """
    captured = CapturedOutput()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink,
        ExitStack() as stack,
    ):
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            saved = os.dup(descriptor)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, descriptor)
            os.dup2(sink.fileno(), descriptor)
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        # A hook of the user's or of a test runner would show them elsewhere.
        warnings.showwarning = _print_warning
        try:
            yield captured
        finally:
            sink.flush()
            sink.seek(0)
            captured.text = sink.read(_MAX_CAPTURED)
            logger.debug("%s", captured.text)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


FAKE_TENSOR_LIMITS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)
"""What fake tensors raise when a value would be needed: it says nothing of the module."""


@contextmanager
def _silent(noisy: logging.Logger) -> Iterator[None]:
    """Keep a logger quiet: a size that a module refuses is an answer, not an error."""
    disabled, noisy.disabled = noisy.disabled, True
    try:
        yield
    finally:
        noisy.disabled = disabled


@contextmanager
def fake_tensors(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Give tensors that have the shapes and no values; modules run on them compute nothing."""
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _silent(logging.getLogger(fake_tensor.__name__)):
        yield tuple(mode.from_tensor(tensor, static_shapes=True) for tensor in tensors)


class WriteAttemptedError(RuntimeError):
    """Raised before an operator writes to a tensor that is to be read only."""


class ReadOnly(TorchDispatchMode):
    """Refuses every operator that would write to some tensors, before it does.

    Args:
        tensors: What is to be read only, and all views of it.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._protected = {_storage(tensor) for tensor in tensors} - {0}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema  # noqa: SLF001 - the only description that operators have
        if schema.is_mutable:
            given = dict(zip((each.name for each in schema.arguments), args, strict=False))
            given |= kwargs or {}
            for each in schema.arguments:
                if each.alias_info is not None and each.alias_info.is_write:
                    self._refuse(given.get(each.name), func)
        return func(*args, **(kwargs or {}))

    def _refuse(self, value: Any, func: Any) -> None:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) in self._protected:
                raise WriteAttemptedError(f"{func} would write to a weight")


def _storage(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory; 0: it has none that could be written to."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors, tensors of other devices
        return 0


def without_modes() -> AbstractContextManager[Any]:
    """Compute real values in the middle of an export."""
    modes: AbstractContextManager[Any] = _disable_current_modes()
    return modes


@contextmanager
def decomposed(operator: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let torch.onnx take a function for an operator that has no decomposition."""
    table: Any = decomposition_table
    if operator in table:
        yield
        return
    table[operator] = function
    try:
        yield
    finally:
        del table[operator]


_registries: dict[object, Any] = {}


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Let torch.onnx read its operators' signatures once in a process and not at each export.

    That takes 0.4 s each time (torch 2.13), a fifth of the export of a small network.
    """
    from torch.onnx._internal.exporter import _registration as module

    registration: Any = module
    registry = registration.ONNXRegistry
    original = registry.__dict__["from_torchlib"]

    def from_torchlib(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # Its operators are there once it is imported.
        key = (args, tuple(sorted(kwargs.items())), "torchvision" in sys.modules)
        if key not in _registries:
            _registries[key] = original.__get__(None, cls)(*args, **kwargs)
        fresh = copy.copy(_registries[key])
        # An export adds the user's own operators.
        fresh.functions = {name: [*known] for name, known in fresh.functions.items()}
        return fresh

    registry.from_torchlib = classmethod(from_torchlib)
    try:
        yield
    finally:
        registry.from_torchlib = original


def is_compiled_forward(forward: object) -> bool:
    """Tell whether ``forward`` is the closure that ``torch.compile`` leaves on a module."""
    return hasattr(forward, "_torchdynamo_orig_callable")


def compiled_graphs() -> int:
    """Return how many graphs ``torch.compile`` has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


@contextmanager
def rewritten_sources(
    rewrite: Callable[[Callable[..., Any], ast.Module], ast.Module],
) -> Iterator[None]:
    """Let a function change each syntax tree on its way to TorchScript's compiler."""
    from torch.jit import frontend as module

    frontend: Any = module
    parse = frontend.parse_def

    def parse_and_rewrite(function: Callable[..., Any]) -> Any:
        parsed = parse(function)
        return parsed._replace(ast=rewrite(function, parsed.ast))

    frontend.parse_def = parse_and_rewrite
    try:
        yield
    finally:
        frontend.parse_def = parse


def forget_half_compiled_types() -> None:
    """Drop what TorchScript keeps of classes for later, after one of them did not compile.

    Script modules that exist hold their own types; a class that is compiled again gets a new one.
    """
    from torch.jit import _recursive as module

    _recursive: Any = module
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()


def gathered_shards(tensor: Any) -> torch.Tensor:
    """Put the shards of a ``ShardedTensor`` together in all processes of its group.

    Its own ``gather``, for one process, breaks where there are several groups, and reads weights
    that are no float32 as if they were (torch 2.13).
    """
    from torch.distributed._state_dict_utils import _all_gather_sharded_tensor

    return _all_gather_sharded_tensor(tensor, tensor._process_group)  # noqa: SLF001


def plain_name(name: str) -> str:
    """Return the name of a module or tensor as it is without PyTorch's wrappers.

    Example:
        >>> plain_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(module: Any) -> Any:
    """Take a module out of the wrappers that PyTorch has put around it."""
    while isinstance(module, torch.nn.Module):
        inner = [part for name, part in vars(module)["_modules"].items() if name in WRAPPERS]
        if not inner:
            break
        module = inner[0]
    return module


WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Where ``torch.compile``, FSDP1 and activation checkpointing keep the module that they wrap."""


def validates_distributions() -> bool:
    """Tell whether ``torch.distributions`` looks at its arguments."""
    return bool(torch.distributions.Distribution._validate_args)  # noqa: SLF001 - has no getter


def validate_distributions(value: bool) -> None:
    """Put back whether it does: dynamo turns it off for the whole process, once.

    Source: ``torch._dynamo.eval_frame.TorchPatcher.patch``, 2.13.
    """
    if validates_distributions() is value:
        return
    torch.distributions.Distribution.set_default_validate_args(value)
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None:  # who compiles next wants it off again
        frames.TorchPatcher.patch.cache_clear()
