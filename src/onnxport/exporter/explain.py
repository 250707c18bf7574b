"""Turn an exporter's error into a sentence: which operator or statement, in which user's line."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import onnxscript
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["explain"]

_LIBRARIES = tuple(
    str(Path(package.__file__).parent)
    for package in (torch, onnxscript)
    if package.__file__ is not None
)
_OWN = str(Path(__file__).parent.parent)
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


def explain(error: BaseException) -> str:
    """Say in a sentence or two what stopped a core.

    Args:
        error: What ``torch.onnx.export`` or the module raised.

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
    for filename, line, function in frames:
        if _is_users(filename):
            source = linecache.getline(filename, line).strip()
            quoted = f" (`{source}`)" if source else ""
            return f"{filename}:{line} in {function}{quoted}"
    return None


def _is_users(filename: str) -> bool:
    if filename.startswith("<") or not filename.endswith(".py"):
        return filename.startswith("<ipython")
    return not filename.startswith((*_LIBRARIES, _OWN))
