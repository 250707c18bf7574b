"""Find the user's own line behind an exporter's error."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from onnxport.exporter.base import ExportRequest

__all__ = [
    "autograd_function_line",
    "calling_line",
    "chain_of",
    "complex_line",
    "fixing_line",
    "traced_lines",
    "user_line",
    "went_through",
]

_LIBRARIES = tuple(
    f"{Path(found.origin).parent}{os.sep}"
    for found in map(find_spec, ("torch", "onnxscript"))  # not imported: 20 MB in the trainer
    if found is not None and found.origin is not None
)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_PACKAGES = "site-packages"
_OWN = f"{Path(__file__).parent.parent}{os.sep}"
_PYTHON_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_JIT_FRAME = re.compile(r"(\S+\.py)\((\d+)\): (\w+)")
_JIT_SOURCE = re.compile(r'File "([^"]+)", line (\d+)\n')
_TRACER_WARNING = re.compile(r"(?m)^(\S.*?\.py):(\d+): TracerWarning: ")

Frame = tuple[str, int, str]
_Noticed: TypeAlias = "Callable[[object, object], bool]"


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def user_line(chain: Sequence[BaseException], text: str) -> str | None:
    """Return ``file.py:12 in forward (`source`)`` for the innermost line of the user's code.

    Args:
        chain: The error and its causes.
        text: What they say, which names lines of compiled code that no traceback has.
    """
    frames = list(_node_frames(chain))
    frames += [frame for error in reversed(chain) for frame in reversed(_frames_of(error))]
    frames += [(m[1], int(m[2]), m[3]) for m in reversed(list(_PYTHON_FRAME.finditer(text)))]
    frames += [(m[1], int(m[2]), m[3]) for m in _JIT_FRAME.finditer(text)]
    frames += [(m[1], int(m[2]), "forward") for m in _JIT_SOURCE.finditer(text)]
    return _first_of_user(frames)


def _frames_of(error: BaseException) -> list[Frame]:
    """Return the traceback, outermost first, without what called onnxport."""
    stack = traceback.extract_tb(error.__traceback__)
    return _below_onnxport([(frame.filename, frame.lineno or 0, frame.name) for frame in stack])


def _below_onnxport(frames: list[Frame]) -> list[Frame]:
    """Leave out what called onnxport, given the outermost frame first.

    A script that called ``export`` is the user's too, and not what could not be exported.
    """
    own = next((i for i, frame in enumerate(frames) if frame[0].startswith(_OWN)), 0)
    return frames[own:]


def went_through(chain: Sequence[BaseException]) -> str:
    """Return ``@file:function`` for every frame that the errors and their node went through."""
    frames = [frame for error in chain for frame in _frames_of(error)]
    return "\n".join(f"@{file}:{function}" for file, _, function in (*frames, *_node_frames(chain)))


def _node_frames(chain: Iterable[BaseException]) -> Iterator[Frame]:
    """Yield the frames that recorded the node which was being translated.

    A translation fails long after the user's code ran, but the node in the exporter's hands knows
    where it comes from.
    """
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node) and node.stack_trace:
                found = [(m[1], int(m[2]), m[3]) for m in _PYTHON_FRAME.finditer(node.stack_trace)]
                yield from reversed(_below_onnxport(found))
            elif isinstance(node, torch._C.Node):  # noqa: SLF001 - has no public name
                source = str(node.sourceRange())
                yield from ((m[1], int(m[2]), m[3]) for m in _JIT_FRAME.finditer(source))
                yield from ((m[1], int(m[2]), m[3]) for m in _PYTHON_FRAME.finditer(source))
                yield from ((m[1], int(m[2]), "forward") for m in _JIT_SOURCE.finditer(source))


def traced_lines(output: str) -> list[str]:
    """Return the user's lines at which the tracer warned that it kept a value as a constant."""
    frames = dict.fromkeys((m[1], int(m[2]), "") for m in _TRACER_WARNING.finditer(output))
    found = (_first_of_user([frame]) for frame in frames)
    return [line for line in found if line is not None]


def _first_of_user(frames: Iterable[Frame]) -> str | None:
    """Describe the first frame in the user's own code, else the first in an installed package."""
    seen = [frame for frame in frames if _is_modelling_code(frame[0])]
    own = [frame for frame in seen if _PACKAGES not in frame[0]]
    for filename, line, function in (own or seen)[:1]:
        source = linecache.getline(filename, line).strip()
        quoted = f" (`{source}`)" if source else ""
        place = f" in {function}" if function else ""
        return f"{filename}:{line}{place}{quoted}"
    return None


def _is_modelling_code(filename: str) -> bool:
    """Tell whether a file is neither torch, onnxscript, onnxport nor Python itself."""
    if not filename.endswith(".py"):
        return filename.startswith("<ipython")
    standard = filename.startswith(_STANDARD_LIBRARY) and _PACKAGES not in filename
    return not standard and not filename.startswith((*_LIBRARIES, _OWN))


def _current_line() -> str | None:
    stack = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_stack()]
    return _first_of_user(reversed(_below_onnxport(stack)))


# --- by running once more -----------------------------------------------------------------------


def calling_line(operator: str, rerun: Callable[[], object]) -> str | None:
    """Run once more and note the user's line that is executing when the operator is called."""
    parts = re.split(r"::|\.", operator.removeprefix("aten"))[1:2]
    name = parts[0] if parts else operator

    def called(function: object, result: object) -> bool:
        return result is None and getattr(function, "__name__", "").partition(".")[0] == name

    return _line_when(called, rerun)


def complex_line(rerun: Callable[[], object]) -> str | None:
    """Run once more and note the user's line that makes the first complex tensor."""
    return _line_when(
        lambda _, result: isinstance(result, torch.Tensor) and result.is_complex(), rerun
    )


def autograd_function_line(rerun: Callable[[], object]) -> str | None:
    """Run once more and note the user's line inside of a ``torch.autograd.Function``."""
    file = f"{os.sep}torch{os.sep}autograd{os.sep}function.py"

    def inside(function: object, result: object) -> bool:
        del function, result
        return any(frame.filename.endswith(file) for frame in traceback.extract_stack())

    return _line_when(inside, rerun)


def _line_when(noticed: _Noticed, rerun: Callable[[], object]) -> str | None:
    watch = _Watch(noticed)
    try:
        with _FunctionHook(watch), _OperatorHook(watch):
            rerun()
    except Exception:  # noqa: BLE001 - user code; only the line is wanted
        return watch.found
    return watch.found


class _Watch:
    """Keeps the user's line of the first call that is noticed, before or after it runs."""

    def __init__(self, noticed: _Noticed) -> None:
        self.found: str | None = None
        self._noticed = noticed

    def call(self, function: Callable[..., object], args: Any, kwargs: Any) -> object:
        self._look(function, None)
        result = function(*args, **(kwargs or {}))
        self._look(function, result)
        return result

    def _look(self, function: object, result: object) -> None:
        if self.found is None and self._noticed(function, result):
            self.found = _current_line()


class _FunctionHook(TorchFunctionMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._watch.call(func, args, kwargs)


class _OperatorHook(TorchDispatchMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._watch.call(func, args, kwargs)


def fixing_line(request: ExportRequest) -> str | None:
    """Run on fake tensors of unknown sizes and note the line that fixes a dynamic one.

    torch.export says only which dimension was fixed. Nothing is computed.
    """
    environment = _WatchedSizes()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), mode:
            request.module(
                *(
                    mode.from_tensor(tensor, symbolic_context=_dims(tensor, axes))
                    for tensor, axes in zip(request.args, request.input_axes, strict=True)
                )
            )
    except Exception:  # noqa: BLE001 - user code on private parts of torch; only the line is wanted
        return environment.found
    return environment.found


def _dims(tensor: torch.Tensor, axes: Iterable[int]) -> StatelessSymbolicContext[Any, Any]:
    dynamic = set(axes)
    return StatelessSymbolicContext(
        dynamic_sizes=[
            DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC
            for axis in range(tensor.ndim)
        ]
    )


class _WatchedSizes(ShapeEnv):
    """Symbolic sizes that note where the first of them becomes a number."""

    found: str | None = None

    @override
    def _set_replacement(self, a: Any, tgt: Any, msg: str) -> None:
        if self.found is None and getattr(tgt, "is_number", False):
            self.found = _current_line()
        super()._set_replacement(a, tgt, msg)
