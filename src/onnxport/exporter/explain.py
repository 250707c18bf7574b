"""Turn an exporter's error into a sentence: which operator or statement, in which user's line."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxscript
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["explain"]

_LIBRARIES = tuple(
    f"{Path(package.__file__).parent}{os.sep}"
    for package in (torch, onnxscript)
    if package.__file__ is not None
)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_PACKAGES = "site-packages"
_OWN = f"{Path(__file__).parent.parent}{os.sep}"
_PYTHON_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_JIT_FRAME = re.compile(r"(\S+\.py)\((\d+)\): (\w+)")
_JIT_SOURCE = re.compile(r'File "([^"]+)", line (\d+)\n')
_OPERATORS = (
    re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'"),
    re.compile(r"No ONNX function found for <([^>]+)>"),
    re.compile(r"Exporting the operator '([^']+)'"),
    re.compile(r"operator '?(aten::\w+)'?"),
    re.compile(r"target: (aten\.\w+(?:\.\w+)?)"),
)
_MAX_LENGTH = 400


def explain(error: BaseException, rerun: Callable[[], object] | None = None) -> str:
    """Say in a sentence or two what stopped a core.

    Args:
        error: What ``torch.onnx.export`` or the module raised.
        rerun: Runs the module eagerly; used to find the line that calls an operator when the error
            does not say.

    Returns:
        The operator without a translation, or the first line of the root error; and the last line
        of the user's own code that was being exported, where it can be found.
    """
    chain = list(_chain(error))
    text = "\n".join(str(link) for link in chain)
    operator = next((m[1] for pattern in _OPERATORS if (m := pattern.search(text))), None)
    if operator is not None:
        what = f"The operator {operator} has no ONNX translation in this core"
    else:
        what = _first_line(chain[-1])
    where = _user_line(chain, text)
    if where is None and operator is not None and rerun is not None:
        where = _calling_line(operator, rerun)
    return f"{what}, at {where}." if where else f"{what}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if any(c.isalpha() for c in line)), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return (text[:_MAX_LENGTH] + "…" if len(text) > _MAX_LENGTH else text).rstrip(".:,")


def _user_line(chain: list[BaseException], text: str) -> str | None:
    """Return ``file.py:12 in forward (`source`)`` for the innermost line of the user's code."""
    frames = [
        (frame.filename, frame.lineno or 0, frame.name)
        for error in reversed(chain)
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    ]
    frames += [(m[1], int(m[2]), m[3]) for m in reversed(list(_PYTHON_FRAME.finditer(text)))]
    frames += [(m[1], int(m[2]), m[3]) for m in _JIT_FRAME.finditer(text)]
    frames += [(m[1], int(m[2]), "forward") for m in _JIT_SOURCE.finditer(text)]
    return _first_of_user(frames)


def _first_of_user(frames: Iterable[tuple[str, int, str]]) -> str | None:
    """Describe the first frame in the user's own code, else the first in an installed package."""
    seen = [frame for frame in frames if _is_modelling_code(frame[0])]
    own = [frame for frame in seen if _PACKAGES not in frame[0]]
    for filename, line, function in (own or seen)[:1]:
        source = linecache.getline(filename, line).strip()
        quoted = f" (`{source}`)" if source else ""
        return f"{filename}:{line} in {function}{quoted}"
    return None


def _calling_line(operator: str, rerun: Callable[[], object]) -> str | None:
    """Run once more and note the user's line that is executing when the operator is called."""
    name = re.split(r"::|\.", operator.removeprefix("aten"))[1:2]
    watch = _Watch(name[0] if name else operator)
    try:
        with watch.functions, watch.operators:
            rerun()
    except Exception:  # noqa: BLE001 - user code; only the line is wanted
        return watch.found
    return watch.found


class _Watch:
    """Finds the first call of an operator, by its name in Python or in the dispatcher."""

    def __init__(self, name: str) -> None:
        self.found: str | None = None
        self.functions = _FunctionHook(self._see)
        self.operators = _OperatorHook(self._see)
        self._name = name

    def _see(self, function: object) -> None:
        called = getattr(function, "__name__", "").partition(".")[0]
        if self.found is None and called == self._name:
            frames = reversed(traceback.extract_stack())
            self.found = _first_of_user((f.filename, f.lineno or 0, f.name) for f in frames)


class _FunctionHook(TorchFunctionMode):
    def __init__(self, see: Callable[[object], None]) -> None:
        super().__init__()
        self._see = see

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see(func)
        return func(*args, **(kwargs or {}))


class _OperatorHook(TorchDispatchMode):
    def __init__(self, see: Callable[[object], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see(func)
        return func(*args, **(kwargs or {}))


def _is_modelling_code(filename: str) -> bool:
    """Tell whether a file is neither torch, onnxscript, onnxport nor Python itself."""
    if not filename.endswith(".py"):
        return filename.startswith("<ipython")
    standard = filename.startswith(_STANDARD_LIBRARY) and _PACKAGES not in filename
    return not standard and not filename.startswith((*_LIBRARIES, _OWN))
