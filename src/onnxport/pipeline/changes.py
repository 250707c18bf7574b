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
    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.plan import Plan

__all__ = ["require_as_then", "what_counts"]

logger = logging.getLogger(__name__)


def what_counts(changed: frozenset[str], plan: Plan, opset: int | None) -> frozenset[str]:
    """Return those of the attributes that changed which a run of the module looks at.

    No other is in a graph, and one that is may decide what no row reaches. Tensors count in any
    case, for they are found in other ways than by their names; so does all where nobody can watch.

    Args:
        changed: Paths, see :func:`onnxport.exporter.fingerprint.fingerprint`.
        plan: The module and its calls.
        opset: As for the export, at whose sizes the module is run, too.
    """
    try:
        calls = (*plan.calls, plan.request(opset).args)
        seen = attributes_read(
            plan.root, lambda: [run_flat(plan.flat, call, isolate=True) for call in calls]
        )
        plain = plain_attributes(plan.root)
    except Exception:  # user code runs in here
        logger.debug("It is not known what a run looks at.", exc_info=True)
        return changed
    return frozenset(path for path in changed if path in seen or path not in plain)


def require_as_then(job: ExportJob) -> None:
    """Refuse a module that is not as it was when an earlier run saved the checkpoint.

    Raises:
        ExportError: With the names of what has changed, or as of :func:`make_plan`.
    """
    if job.then is None or job.fingerprint is None:
        return
    changed = changed_paths(job.then, job.fingerprint)
    if not changed:
        return
    # What the module computed then is compared later: here the names are wanted.
    if read := what_counts(changed, make_plan(replace(job, reference=None)), job.options.opset):
        raise ExportError(
            f"The module is not as it was when this checkpoint was saved: {', '.join(sorted(read))}"
            " changed, and is no weight. A fit with the module as it was then makes the model."
        )
