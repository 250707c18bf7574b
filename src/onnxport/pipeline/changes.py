"""Which of the attributes that changed a graph may hold."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from onnxport.errors import ExportError
from onnxport.exporter.fingerprint import changed_paths
from onnxport.exporter.isolation import attributes_read, plain_attributes
from onnxport.pipeline.plan import make_plan
from onnxport.pipeline.runs import run_flat

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.plan import Plan

__all__ = ["require_as_then", "what_counts"]

logger = logging.getLogger(__name__)


def what_counts(
    changed: frozenset[str], plan: Callable[[], Plan], opset: int | None
) -> frozenset[str]:
    """Return those of the attributes that changed which a run of the module looks at.

    No other is in a graph, and one that is may decide what no row reaches. Tensors count in any
    case, for they are found in other ways than by their names; so does all where nobody can watch.

    Args:
        changed: Paths, see :func:`onnxport.exporter.fingerprint.fingerprint`.
        plan: Gives the module and its calls; user code runs in there.
        opset: As for the export, at whose sizes the module is run, too.
    """
    try:
        made = plan()
        calls = (*made.calls, made.request(opset).args)
        seen = attributes_read(
            made.root, lambda: [run_flat(made.flat, call, isolate=True) for call in calls]
        )
        plain = plain_attributes(made.root)
    except Exception:
        logger.debug("It is not known what a run looks at.", exc_info=True)
        return changed
    return frozenset(path for path in changed if path in seen or path not in plain)


def require_as_then(job: ExportJob) -> None:
    """Refuse a module that is not as it was when an earlier run saved the checkpoint.

    Raises:
        ExportError: With the names of what has changed.
    """
    if job.then is None or job.fingerprint is None:
        return
    changed = changed_paths(job.then, job.fingerprint)
    # What the module computed then is compared later: here the names are wanted.
    now = replace(job, reference=None)
    read = what_counts(changed, lambda: make_plan(now), job.options.opset) if changed else changed
    if read:
        raise ExportError(
            f"The module is not as it was when this checkpoint was saved: {', '.join(sorted(read))}"
            " changed, and is no weight. A fit with the module as it was then makes the model."
        )
