"""Try one way after the other; the first whose model passes the proof wins."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from onnxport._torch_compat import CapturedOutput, captured_output, export_context
from onnxport.errors import OnnxportError, VerificationError
from onnxport.exporter.control_flow import branches
from onnxport.exporter.dynamo import DynamoCore
from onnxport.exporter.explain import explain, explain_mismatch
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import isolated
from onnxport.exporter.locate import traced_lines
from onnxport.exporter.patches import PATCHES, applied, patches_for, text_of
from onnxport.exporter.reproduce import FailedAttempt
from onnxport.exporter.torchscript import ScriptCore, TraceCore
from onnxport.report import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import onnx_ir as ir

    from onnxport.exporter.base import Core, ExportRequest
    from onnxport.report import Check

__all__ = ["Climb", "Rung", "climb", "named_rung", "rungs"]

logger = logging.getLogger(__name__)

_DYNAMO: tuple[Core, ...] = (DynamoCore(), DynamoCore(automatic=True))
_UNOPTIMISED: tuple[Core, ...] = (DynamoCore(automatic=True, optimize=False),)
_TORCHSCRIPT: tuple[Core, ...] = (TraceCore(), TraceCore(scripted=True), ScriptCore())
_CONTROL_FLOW: tuple[Core, ...] = (TraceCore(scripted=True), ScriptCore())
_LADDERS: dict[str, tuple[Core, ...]] = {
    "auto": _DYNAMO + _TORCHSCRIPT + _UNOPTIMISED,
    "dynamo": _DYNAMO + _UNOPTIMISED,
    "torchscript": _TORCHSCRIPT,
    "trace": (TraceCore(), TraceCore(scripted=True)),
    "script": (ScriptCore(),),
}

_ABOUT_SIZES = (
    *("dimension", "dynamic", "constraint", "specializ", "disagree", "onnx runtime fails"),
    *("guard", "symbolic", "should be", "conflict", "size"),
)
_ABOUT_OPTIMISING = ("pass", "optimiz", "disagree", "onnx runtime", "fold", "onnx.checker")


@dataclass(frozen=True, slots=True)
class Rung:
    """A core and the patches it runs under."""

    core: Core
    patches: frozenset[str] = frozenset()

    @property
    def variant(self) -> str:
        """How the core is asked, in words, or ``""``."""
        return ", ".join(word for word in (self.core.variant, *sorted(self.patches)) if word)

    @property
    def key(self) -> str:
        """A name under which it can be remembered."""
        return f"{self.core.name}/{self.variant}"


@dataclass(slots=True)
class Climb:
    """What came of a climb.

    Args:
        winner: The rung that won, or ``None``.
        attempts: All attempts, in order.
        failures: What each failed attempt raised and printed, in order.
        checks: The checks of the last model proven.
        hopeless: Cores that would fail alike with other sizes.
        disagreed: Cores whose model was wrong, and the first check that showed it.
        patches: Patches whose symptom was seen.
        warnings: What the proof may not have seen of the model that won.
    """

    winner: Rung | None = None
    attempts: list[Attempt] = field(default_factory=list)
    failures: list[FailedAttempt] = field(default_factory=list)
    checks: tuple[Check, ...] = ()
    hopeless: set[Core] = field(default_factory=set)
    disagreed: dict[Core, Check] = field(default_factory=dict)
    patches: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def rungs(core: str, first: Rung | None = None) -> tuple[Rung, ...]:
    """Return the rungs to try, in order.

    Args:
        core: The ``core`` option.
        first: A rung that won before, tried first.
    """
    ladder = tuple(Rung(one) for one in _LADDERS[core])
    if first is None or first.core not in _LADDERS[core]:
        return ladder
    return (first, *(rung for rung in ladder if rung != first))


def named_rung(core: str, key: str) -> Rung | None:
    """Return the rung of a ladder that was remembered under a name, or ``None``."""
    name, _, variant = key.partition("/")
    words = frozenset(variant.split(", ")) if variant else frozenset()
    patches = words & {patch.name for patch in PATCHES}
    found = (Rung(one, patches) for one in _LADDERS[core] if one.name == name)
    return next((rung for rung in found if rung.key == key), None)


def climb(
    ladder: Sequence[Rung],
    request: ExportRequest,
    prove: Callable[[Rung, ir.Model], tuple[Check, ...]],
    skip: Collection[Core] = (),
    patches: frozenset[str] = frozenset(),
    trusted: Rung | None = None,
    announce: Callable[[Rung], None] = lambda _: None,
) -> Climb:
    """Export in one way after the other until a model passes the proof.

    When an attempt shows the symptom of a known trap, the same core is tried again at once under
    the patch for it, and so are all that follow. A trace that passed but kept what Python decided
    has to wait until the cores that keep control flow were tried: other data may decide otherwise.

    Args:
        ladder: The rungs, in order.
        request: What to export.
        prove: Writes and proves a model; raises :class:`VerificationError` when it is wrong.
        skip: Cores that are known to fail.
        patches: Patches whose symptom was seen before.
        trusted: A rung that won before: what its trace keeps was weighed then.
        announce: Called with each rung before it is tried.

    Returns:
        The winner or ``None``, the attempts and why each failed.

    Raises:
        OnnxportError: If the disk or the installation fails, which no other core would mend.
    """
    climbed = Climb(patches=patches)
    waiting: Rung | None = None

    def may_help(rung: Rung) -> bool:
        if waiting is not None and rung.core not in _CONTROL_FLOW:
            return False
        return rung.core not in skip and _worth_trying(rung.core, request, climbed)

    for place, rung in enumerate(ladder):
        if not may_help(rung):
            continue
        announce(rung)
        tried, error = _attempt_with_patches(rung, request, prove, climbed)
        if error is not None:
            continue
        if climbed.warnings and waiting is None and tried != trusted:
            waiting = tried
            if any(may_help(other) for other in ladder[place + 1 :]):
                _set_aside(climbed)
                continue
        climbed.winner = tried
        return climbed
    if waiting is not None and _attempt(waiting, request, prove, climbed) is None:
        climbed.winner = waiting
    return climbed


def _attempt_with_patches(
    rung: Rung,
    request: ExportRequest,
    prove: Callable[[Rung, ir.Model], tuple[Check, ...]],
    climbed: Climb,
) -> tuple[Rung, Exception | None]:
    """Try a rung, and again under each patch whose symptom shows."""
    while True:
        tried = Rung(rung.core, rung.patches | climbed.patches)
        error = _attempt(tried, request, prove, climbed)
        if error is None:
            return tried, None
        known = patches_for(text_of(error), request.module) - tried.patches
        climbed.patches |= known
        if not known:
            return tried, error


def _set_aside(climbed: Climb) -> None:
    """Note of the last attempt that its model is right as far as the proof sees, and waits."""
    reason = f"{climbed.warnings[0]} Cores that keep control flow are tried first."
    climbed.attempts[-1] = replace(climbed.attempts[-1], ok=False, reason=reason)
    climbed.warnings = ()


def _attempt(
    rung: Rung,
    request: ExportRequest,
    prove: Callable[[Rung, ir.Model], tuple[Check, ...]],
    climbed: Climb,
) -> Exception | None:
    start = time.perf_counter()
    climbed.hopeless.discard(rung.core)  # whatever it was without the patches that it has now
    reason, output = "", CapturedOutput()
    failure: Exception | None = None
    try:
        with (
            preserved_globals(),
            export_context(),
            captured_output() as output,
            applied(rung.patches, request.module),
            isolated(request.module) if request.module.keeps_state else nullcontext(),
        ):
            model = rung.core.export(request)
        climbed.checks = prove(rung, model)
        climbed.warnings = _frozen(traced_lines(output.text))
    except VerificationError as error:
        reason = explain_mismatch(error, rung.core.name, output.text)
        climbed.checks, failure = error.checks, error
        if error.checks and not error.checks[-1].ok:
            climbed.disagreed[rung.core] = error.checks[-1]
    except OnnxportError:
        raise  # the disk or the installation, not the core
    except Exception as error:
        reason, failure = explain(error, request=request), error
        if not _says(f"{error} {reason}".lower(), _ABOUT_SIZES):
            climbed.hopeless.add(rung.core)
        logger.debug("%s failed", rung.key, exc_info=True)
    climbed.attempts.append(
        Attempt(
            core=rung.core.name,
            variant=rung.variant,
            ok=failure is None,
            reason=reason,
            seconds=time.perf_counter() - start,
        )
    )
    if failure is not None:
        climbed.failures.append(
            FailedAttempt(
                core=rung.core.name,
                variant=rung.variant,
                error=failure,
                output=output.text,
                reason=reason,
            )
        )
    return failure


def _frozen(lines: Sequence[str]) -> tuple[str, ...]:
    """Say what a trace kept; whether other data would go another way only its author knows."""
    if not lines:
        return ()
    count = f"{len(lines)} lines" if len(lines) > 1 else "one line"
    text = (
        f"Traced: what {count} decided or computed in Python is kept as it was; no rows or sizes "
        f"of the proof decided otherwise. First: {lines[0]}."
    )
    return (text,)


def _worth_trying(core: Core, request: ExportRequest, climbed: Climb) -> bool:
    """Skip what cannot help: each variant of a core answers one kind of failure."""
    failed = [attempt for attempt in climbed.attempts if attempt.core == core.name]
    reasons = " ".join(attempt.reason.lower() for attempt in failed)
    if core == DynamoCore(automatic=True) and failed:
        last = failed[-1].reason.lower()
        return "data-dependent" not in last and _says(last, _ABOUT_SIZES)
    if core == DynamoCore(automatic=True, optimize=False) and failed:
        return _says(reasons, _ABOUT_OPTIMISING)
    if core == TraceCore(scripted=True):
        below = list(request.module.module.modules())[1:]
        return any(branches(submodule) for submodule in below)
    return True


def _says(text: str, words: Sequence[str]) -> bool:
    return any(word in text for word in words)
