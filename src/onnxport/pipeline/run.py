"""From a job to a published model and a report; never an exception for a model that fails."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from onnxport.errors import OnnxportError, PublishError
from onnxport.exporter.ladder import Climb, climb, rungs
from onnxport.exporter.memory import RungMemory, model_key
from onnxport.exporter.ownership import is_our_report
from onnxport.exporter.reproduce import FailedAttempt, reproduction_path, write_reproduction
from onnxport.exporter.target import target_text
from onnxport.exporter.writer import (
    publish,
    remove_model,
    report_path,
    require_replaceable,
    staging,
    write_model,
    write_text,
)
from onnxport.inputs.resize import current_sizes
from onnxport.pipeline.plan import Plan, make_plan
from onnxport.pipeline.proof import REAL, Proof
from onnxport.report import ExportReport
from onnxport.validation.session import runtime_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from onnxport.exporter.base import Core
    from onnxport.exporter.ladder import Rung
    from onnxport.pipeline.job import ExportJob
    from onnxport.report import Attempt, Check

__all__ = ["Pipeline", "read_report", "save_report"]

logger = logging.getLogger(__name__)


class Pipeline:
    """Exports one module after the other and remembers which rung of the ladder won.

    Args:
        memory: Where that is remembered between runs.
    """

    def __init__(self, memory: RungMemory | None = None) -> None:
        self._memory = RungMemory() if memory is None else memory
        self._winners: dict[str, Rung] = {}
        self._reproduced = False

    def run(self, job: ExportJob) -> ExportReport:
        """Export, prove and publish.

        Returns:
            The report, also written beside the model as ``<name>.onnx.json``. If there is no proven
            model, ``ok`` is false, ``error`` says why, and an older model of this name is gone.
        """
        draft = _draft(job)
        seconds: dict[str, float] = {}
        try:
            require_replaceable(job.path)
            report = self._run(job, draft, seconds)
        except OnnxportError as error:
            report = replace(draft, error=str(error))
        except Exception as error:  # user code runs in here; the error is reported, see below
            logger.exception("Exporting %s failed unexpectedly", job.path)
            report = replace(draft, error=f"{type(error).__name__}: {error}")
        report = replace(report, seconds={key: round(value, 4) for key, value in seconds.items()})
        if report.ok:
            try:
                _write_report(report, job.path)
            except OnnxportError as error:
                report = replace(report, ok=False, path=None, error=str(error))
        if not report.ok:
            report = _discard_stale(report, job.path)
            save_report(report, job.path)
        return report

    def _run(self, job: ExportJob, draft: ExportReport, seconds: dict[str, float]) -> ExportReport:
        attempts: list[Attempt] = []
        failures: list[FailedAttempt] = []
        climbed, flat = Climb(), None
        for plan in _plans(job, attempts, seconds):
            if plan.flat is not flat:  # in another precision all may go otherwise
                climbed, flat = Climb(patches=climbed.patches), plan.flat
            with _timed(seconds, "reference"):
                proof = Proof(plan, job.options.verify)
            draft = replace(
                draft,
                inputs=plan.signature.inputs,
                outputs=plan.signature.outputs,
                evidence=plan.axes.evidence,
                warnings=(*plan.warnings, *proof.warnings),
            )
            with staging(job.path) as staged:
                climbed, opset = self._climb(job, plan, proof, staged, seconds, climbed)
                attempts += climbed.attempts
                failures += climbed.failures
                draft = replace(draft, attempts=tuple(attempts), checks=climbed.checks)
                if climbed.winner is None:
                    continue
                with _timed(seconds, "publish"):
                    publish(staged, job.path)
                    shutil.rmtree(reproduction_path(job.path), ignore_errors=True)
            core = climbed.winner.core.name
            warnings = (*draft.warnings, *climbed.warnings)
            return replace(
                draft, ok=True, path=str(job.path), core=core, opset=opset, warnings=warnings
            )
        return replace(draft, error=_no_core(draft) + self._reproduce(job, plan, failures))

    def _reproduce(self, job: ExportJob, plan: Plan, failures: Sequence[FailedAttempt]) -> str:
        """Write what repeats the failure, once per run: it holds the module's weights."""
        if self._reproduced:
            return ""
        request = plan.request(job.options.opset)
        folder = write_reproduction(reproduction_path(job.path), request, failures)
        self._reproduced = folder is not None
        return f" To repeat it: {folder}/reproduce.py" if folder is not None else ""

    def _climb(
        self,
        job: ExportJob,
        plan: Plan,
        proof: Proof,
        staged: Path,
        seconds: dict[str, float],
        before: Climb,
    ) -> tuple[Climb, int | None]:
        """Try the rungs on one plan; the proven model lies at ``staged`` when one won.

        What was learnt from the plan before it is not tried again.
        """
        opset: int | None = None

        def prove(rung: Rung, model: ir.Model) -> tuple[Check, ...]:
            nonlocal opset
            with _timed(seconds, "write"):
                write_model(
                    model,
                    staged,
                    signature=plan.signature,
                    metadata=_metadata(job, plan, proof, rung),
                    weights=plan.flat.weight_names(job.module),
                )
            with _timed(seconds, "prove"):
                checks, opset = proof.judge(staged)
            return checks

        core, key = job.options.core, model_key(plan.flat)
        first = self._winners.get(key) or self._memory.recall(key, core)
        spent = seconds.get("write", 0.0) + seconds.get("prove", 0.0)
        with _timed(seconds, "export"):
            climbed = climb(
                rungs(core, first),
                plan.request(job.options.opset),
                prove,
                skip=before.hopeless | _wrong_as_seen(plan, before),
                patches=before.patches,
                trusted=first,
            )
        climbed.hopeless |= before.hopeless
        seconds["export"] -= seconds.get("write", 0.0) + seconds.get("prove", 0.0) - spent
        if climbed.winner is not None and climbed.winner != self._winners.get(key):
            self._winners[key] = climbed.winner
            self._memory.remember(key, core, climbed.winner)
        return climbed, opset


def _plans(
    job: ExportJob, attempts: Sequence[Attempt], seconds: dict[str, float]
) -> Iterator[Plan]:
    """Yield the plan that asks for most, then those that ask for less, while none succeeds."""
    with _timed(seconds, "plan"):
        plan = make_plan(job)
    yield plan
    if any(_lacks_kernel(attempt) for attempt in attempts) and job.options.precision is None:
        # ONNX Runtime's CPU provider lacks many kernels for other types than float32.
        text = "ONNX Runtime lacks a kernel for the weights' type: exported as float32."
        options = replace(job.options, precision="fp32")
        with _timed(seconds, "plan"):
            plan = make_plan(replace(job, options=options, warnings=(*job.warnings, text)))
        yield plan
    yield from plan.fallbacks()


def _wrong_as_seen(plan: Plan, before: Climb) -> set[Core]:
    """Return the cores whose model was wrong at a call that was seen, and that has its sizes still.

    With other sizes than the batch dynamic, the next plan asks the same of them.
    """
    axes = plan.axes
    others = set(axes.names) - set(axes.batches)
    if not others:
        return set()
    seen = [current_sizes(call, axes.inputs) for call in plan.calls]
    return {
        core
        for core, check in before.disagreed.items()
        if check.rows == REAL
        and any(all(check.sizes.get(name) == call[name] for name in others) for call in seen)
    }


def _lacks_kernel(attempt: Attempt) -> bool:
    return "NOT_IMPLEMENTED" in attempt.reason or "Could not find an implementation" in (
        attempt.reason
    )


def _draft(job: ExportJob) -> ExportReport:
    origin = job.provenance
    return ExportReport(
        ok=False,
        checkpoint=origin.checkpoint,
        epoch=origin.epoch,
        global_step=origin.global_step,
        metrics=origin.metrics,
        weights_sha256=job.weights_sha256,
        target=target_text(job.target),
        warnings=job.warnings,
    )


def _metadata(job: ExportJob, plan: Plan, proof: Proof, rung: Rung) -> dict[str, object]:
    """What the file itself says about where it comes from."""
    from onnxport import __version__

    specs = (*plan.signature.inputs, *plan.signature.outputs)
    known: dict[str, Any] = {
        "version": __version__,
        "checkpoint": Path(job.provenance.checkpoint).name if job.provenance.checkpoint else None,
        "weights_sha256": job.weights_sha256,
        "epoch": job.provenance.epoch,
        "global_step": job.provenance.global_step,
        "metrics": {key: repr(value) for key, value in job.provenance.metrics.items()},
        "target": target_text(job.target) or None,
        "core": rung.core.name,
        "dynamic_axes": {spec.name: spec.dynamic_axes for spec in specs if spec.dynamic_axes},
        "error_budget": proof.budgets,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": runtime_version(),
    }
    return {key: value for key, value in known.items() if value is not None}


def _no_core(report: ExportReport) -> str:
    tried = "; ".join(
        f"{attempt.core}{f' ({attempt.variant})' if attempt.variant else ''}: {attempt.reason}"
        for attempt in report.attempts
    )
    return f"No core produced a model that passed the proof. {tried}"


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def read_report(path: Path) -> ExportReport | None:
    """Read the report beside a model; ``None`` if there is none of ours."""
    try:
        return ExportReport.from_json(report_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def save_report(report: ExportReport, path: Path) -> None:
    """Write the report beside the model; a disk that does not take it is logged."""
    try:
        _write_report(report, path)
    except OnnxportError as error:
        logger.warning("The report of %s was not written: %s", path, error)


def _write_report(report: ExportReport, path: Path) -> None:
    """Write the report beside the model.

    Raises:
        PublishError: If the disk does not take it, or a file of somebody else has its name.
    """
    file = report_path(path)
    if file.is_file() and not is_our_report(file):
        raise PublishError(f"{file} was not written by onnxport and is left alone.")
    write_text(file, report.to_json())


def _discard_stale(report: ExportReport, path: Path) -> ExportReport:
    """Remove an older model of ours: it would hold other weights than its checkpoint."""
    try:
        remove_model(path)
    except OSError as error:
        stale = f"{path} holds older weights and cannot be removed ({error.strerror or error})."
        return replace(report, error=f"{report.error} {stale}")
    return report
