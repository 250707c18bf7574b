"""Try the cores in order; the first whose model passes the proof wins."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from onnxport._torch_compat import captured_output, export_context
from onnxport.errors import OnnxportError, VerificationError
from onnxport.exporter.dynamo import DynamoCore
from onnxport.exporter.explain import explain
from onnxport.exporter.module_state import preserved_rng
from onnxport.exporter.torchscript import ScriptCore, TraceCore
from onnxport.report import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from onnxport.exporter.base import Core, ExportRequest
    from onnxport.report import Check

__all__ = ["climb", "rungs"]

logger = logging.getLogger(__name__)

_DYNAMO: tuple[Core, ...] = (DynamoCore(), DynamoCore(automatic=True))
_TORCHSCRIPT: tuple[Core, ...] = (TraceCore(), ScriptCore())
_LADDERS: dict[str, tuple[Core, ...]] = {
    "auto": _DYNAMO + _TORCHSCRIPT,
    "dynamo": _DYNAMO,
    "torchscript": _TORCHSCRIPT,
    "trace": (TraceCore(),),
    "script": (ScriptCore(),),
}


def rungs(core: str, first: Core | None = None) -> tuple[Core, ...]:
    """Return the cores to try, in order.

    Args:
        core: The ``core`` option.
        first: A core that won before, tried first.
    """
    ladder = _LADDERS[core]
    return ladder if first not in ladder else (first, *(c for c in ladder if c != first))


def climb(
    ladder: Sequence[Core],
    request: ExportRequest,
    prove: Callable[[Core, ir.Model], tuple[Check, ...]],
) -> tuple[Core | None, tuple[Attempt, ...], tuple[Check, ...]]:
    """Export with one core after the other until a model passes the proof.

    Args:
        ladder: The cores, in order.
        request: What to export.
        prove: Writes and proves a model; raises :class:`VerificationError` when it is wrong.

    Returns:
        The core that won or ``None``, the attempts, and the checks of the last model proven.

    Raises:
        OnnxportError: If the disk or the installation fails, which no other core would mend.
    """
    attempts: list[Attempt] = []
    checks: tuple[Check, ...] = ()
    for core in ladder:
        if not _worth_trying(core, attempts):
            continue
        start = time.perf_counter()
        reason = ""
        try:
            with preserved_rng(), export_context(), captured_output():
                model = core.export(request)
            checks = prove(core, model)
        except VerificationError as error:
            reason, checks = str(error), error.checks
        except OnnxportError:
            raise  # the disk or the installation, not the core
        except Exception as error:
            reason = explain(error, lambda: request.module(*request.args))
            logger.debug("%s failed", core.name, exc_info=True)
        attempts.append(
            Attempt(
                core=core.name,
                variant=core.variant,
                ok=not reason,
                reason=reason,
                seconds=time.perf_counter() - start,
            )
        )
        if not reason:
            return core, tuple(attempts), checks
    return None, tuple(attempts), checks


def _worth_trying(core: Core, attempts: Sequence[Attempt]) -> bool:
    """Skip automatic dims unless the plain dynamo attempt stumbled over a size."""
    if core.name != "dynamo" or not core.variant or not attempts:
        return True
    reason = attempts[-1].reason.lower()
    words = ("dimension", "dynamic", "constraint", "specializ", "disagree", "onnx runtime fails")
    return "data-dependent" not in reason and any(word in reason for word in words)
