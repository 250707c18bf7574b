"""Say in a sentence or two why an attempt failed: what, in which line of the user's, what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from onnxport.exporter.failures import FAILURES, MISMATCHES, recognised
from onnxport.exporter.locate import (
    autograd_function_line,
    calling_line,
    chain_of,
    complex_line,
    fixing_line,
    traced_lines,
    user_line,
    went_through,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxport.errors import VerificationError
    from onnxport.exporter.base import ExportRequest
    from onnxport.exporter.failures import FailureClass

__all__ = ["classify", "explain", "explain_mismatch"]

_MAX_LENGTH = 400
_MAX_QUOTED = 160
_GUESSED = re.compile(r"inputs(?:\['tensors'\])?\[(?P<input>\d+)\]\.shape\[(?P<axis>\d+)\]")
_MAX_LINES = 3
_INTERPRETER = "failed in the TorchScript interpreter"
_QUOTE = "<--- HERE"


def explain(
    error: BaseException,
    rerun: Callable[[], object] | None = None,
    request: ExportRequest | None = None,
) -> str:
    """Say in a sentence or two what stopped a core.

    Args:
        error: What ``torch.onnx.export`` or the module raised.
        rerun: Runs the module eagerly; used to find the line that calls an operator when the error
            does not say. Default: with the request's example.
        request: What was to be exported; used to name dimensions and to find the line that fixes
            one.

    Returns:
        What could not be exported and in which line of the user's own code, where it can be found;
        why; and the smallest change. An error of no known class is told by its first line.
    """
    chain = list(chain_of(error))
    text = _text(chain)
    known = recognised(FAILURES, text)
    # What waits for a process that died is not what killed it.
    where = None if known is not None and known[0].name == "crash" else user_line(chain, text)
    message = _first_line(chain[-1])
    if known is None:
        return f"{message}, at {where}." if where else f"{message}."
    failure, match = known
    facts = _facts(match) | {"message": _cut(message, _MAX_QUOTED)}
    if "dim" in facts:
        facts["dim"] = _named_dim(facts["dim"], request)
        facts.setdefault("size", "one size")
        where = where or (fixing_line(request) if request is not None else None)
    again = rerun or ((lambda: request.module(*request.args)) if request is not None else None)
    if where is None and again is not None:
        where = _line_of_rerun(failure, facts, again)
    return _sentence(failure, facts, where)


def _line_of_rerun(
    failure: FailureClass, facts: dict[str, str], rerun: Callable[[], object]
) -> str | None:
    if failure.name == "complex":
        return complex_line(rerun)
    if failure.name == "custom autograd function":
        return autograd_function_line(rerun)
    return calling_line(facts["operator"], rerun) if "operator" in facts else None


def classify(error: BaseException) -> FailureClass | None:
    """Return the class of failure that an error belongs to, or ``None``."""
    chain = list(chain_of(error))
    known = recognised(FAILURES, _text(chain))
    return None if known is None else known[0]


def explain_mismatch(error: VerificationError, core: str, output: str = "") -> str:
    """Add the likely cause, and what to do, to what a proof found wrong.

    Args:
        error: What the proof raised.
        core: The core whose model it is.
        output: What torch printed during the export: the tracer warns there, with the user's line,
            where it keeps a value as a constant.

    Returns:
        The fact, the cause and the smallest change; the fact alone where nothing is known, e.g.
        when a provider was not there.
    """
    fact = str(error)
    lines = traced_lines(output)[:_MAX_LINES] if core != "dynamo" else []
    known = recognised(MISMATCHES, fact)
    if known is not None:
        failure, match = known
        facts = _facts(match)
        why, advice = failure.why.format_map(facts), failure.advice.format_map(facts)
        frozen = failure.name in {"shape baked in", "dimension specialised"}
    elif error.checks and not error.checks[-1].ok:
        why, advice = _why_numbers_differ(error, traced=bool(lines))
        frozen = True
    else:
        return fact
    noted = f", as it warned at {'; '.join(lines)}" if lines and frozen else ""
    return f"{fact.rstrip('.')}: {why}{noted}. {advice}."


_FROZEN_VALUE = (
    "other values of the same size agree, so one way of a branch on the data, or a number taken "
    "from it, was kept as a constant"
)
_FROZEN_SIZE = "other sizes agree, so a size, or a branch on a size, was kept as a constant"
_FROZEN = "the tracer kept a value of the example as a constant"
_WRONG = (
    "the first comparison already fails, so a value of the example was kept as a constant, an "
    "operator is translated wrongly, or the module gives other numbers in each call"
)
_BY_DATA = "Choose by data with torch.where or torch.cond"
_BY_SIZE = "Take sizes from x.shape where they are used, without int()"


def _why_numbers_differ(error: VerificationError, *, traced: bool) -> tuple[str, str]:
    """Compare the failed check with those that agreed: what changed between them is the cause."""
    failed, agreed = error.checks[-1], error.checks[:-1]
    if any(check.sizes == failed.sizes and check.rows != failed.rows for check in agreed):
        return _FROZEN_VALUE, _BY_DATA
    if agreed:
        return _FROZEN_SIZE, _BY_SIZE
    if traced:
        return _FROZEN, f"{_BY_DATA}; take sizes from x.shape where they are used, without int()"
    return _WRONG, "Choose another core with core=, and look for state that forward changes"


def _sentence(failure: FailureClass, facts: dict[str, str], where: str | None) -> str:
    title = failure.title.format_map(facts)
    place = f", at {where}" if where else ""
    why = f": {failure.why}" if failure.why else ""
    return f"{title}{place}{why}. {failure.advice.format_map(facts)}."


def _text(chain: list[BaseException]) -> str:
    links = [f"{type(link).__name__}: {link}" for link in chain]
    # It quotes the source like a compiler, for an error that running the code raised.
    links = [link.replace(_QUOTE, "") if _INTERPRETER in link else link for link in links]
    return "\n".join([*links, went_through(chain)])


def _facts(match: re.Match[str]) -> dict[str, str]:
    """Return the groups that matched; alternatives of one group are numbered."""
    groups = match.groupdict().items()
    return {name.rstrip("0123456789"): value for name, value in groups if value is not None}


def _named_dim(dim: str, request: ExportRequest | None) -> str:
    """Say ``'batch' (axis 0 of 'x')`` for torch's ``inputs['tensors'][0].shape[0]``."""
    match = _GUESSED.search(dim)
    if match is None:
        return dim
    place, axis = int(match["input"]), int(match["axis"])
    if request is None or place >= len(request.input_names):
        return f"axis {axis} of input {place}"
    name = request.input_axes[place].get(axis)
    where = f"axis {axis} of {request.input_names[place]!r}"
    return f"{name!r} ({where})" if name else where


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and _INTERPRETER in lines[0]:
        return _cut(lines[-1], _MAX_LENGTH).rstrip(".:,")
    text = next((line for line in lines if any(c.isalpha() for c in line)), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return _cut(text, _MAX_LENGTH).rstrip(".:,")


def _cut(text: str, length: int) -> str:
    return text[:length] + "…" if len(text) > length else text
