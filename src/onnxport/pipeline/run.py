"""From a job to a published model and a report; never an exception for a model that fails."""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onnxport._files import size_of_model, sync
from onnxport.errors import (
    ExportError,
    OnnxportError,
    PublishError,
    VerificationError,
    WorkerError,
)
from onnxport.exporter.ladder import Climb, climb, rungs
from onnxport.exporter.memory import RungMemory, model_key
from onnxport.exporter.reproduce import (
    FailedAttempt,
    loads_module,
    reproduction_path,
    write_reproduction,
)
from onnxport.exporter.target import target_text
from onnxport.exporter.template import StaleTemplateError
from onnxport.exporter.weights import weights_sha256
from onnxport.exporter.writer import (
    publish,
    require_replaceable,
    staging,
)
from onnxport.inputs.resize import current_sizes
from onnxport.pipeline.blueprint_file import save_blueprint
from onnxport.pipeline.candidate import Candidate, origin_of
from onnxport.pipeline.changes import require_as_then
from onnxport.pipeline.job import VALIDATE, GivenModule, SourceLostError
from onnxport.pipeline.metrics import MetricRun
from onnxport.pipeline.plan import Plan, make_plan, one_row
from onnxport.pipeline.proof import REAL, Proof
from onnxport.pipeline.refresh import refresh
from onnxport.pipeline.report_files import discard_stale, save_report, write_report
from onnxport.pipeline.stopwatch import Stopwatch
from onnxport.pipeline.variants import Variants
from onnxport.report import TO_REPEAT, Attempt, ExportReport
from onnxport.validation.session import PrepSessions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor, Future
    from pathlib import Path

    import numpy as np

    from onnxport.exporter.base import Core
    from onnxport.exporter.ladder import Rung
    from onnxport.pipeline.blueprint import Blueprint
    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.proof import Case
    from onnxport.report import Latency, MetricParity, Variant

__all__ = ["Pipeline"]

logger = logging.getLogger(__name__)


class Pipeline:
    """Turns one set of weights after the other into models, and remembers what it has learnt.

    The first is exported; the next ones get its graph with their weights, as long as that is what
    the module computes.

    Args:
        memory: Where it is remembered between runs which rung of the ladder won.

    Attributes:
        blueprint: What is known of the last export, or ``None``: the next one is an export.
        row: One row for each input of the last export, by name; ``None``: it is large, or of no
            type that NumPy knows.
        tell: Called when a stage begins, with its name and the rung that is tried, if any.
    """

    def __init__(self, memory: RungMemory | None = None) -> None:
        self._memory = RungMemory() if memory is None else memory
        self._winners: dict[str, Rung] = {}
        self._reproduced = False
        self._prep = PrepSessions()
        self.blueprint: Blueprint | None = None
        self.row: dict[str, np.ndarray[Any, Any]] | None = None
        self._speeds: dict[str, tuple[Latency, ...]] = {}
        self.tell: Callable[[str, str | None], None] = lambda _, __: None

    def run(self, job: ExportJob) -> ExportReport:
        """Refresh or export, prove and publish.

        Returns:
            The report, also written beside the model as ``<name>.onnx.json``. If there is no proven
            model, ``ok`` is false, ``error`` says why, and an older model of this name is gone.

        Raises:
            SourceLostError: If the job is not to be done here; nothing is left of it.
            CheckpointGoneError: If the checkpoint has changed meanwhile.
        """
        draft = _draft(job)
        watch = Stopwatch(self.tell)
        stale: tuple[Attempt, ...] = ()
        try:
            require_replaceable(job.path)
            require_as_then(job)
            known = self.blueprint
            report, stale = self._refresh(job, draft, watch)
            if report is None:
                report = self._export(job, replace(draft, attempts=stale), watch, known)
        except SourceLostError as error:
            for attempt in stale:
                error.add_note(attempt.reason)
            raise
        except OnnxportError as error:
            report = _failed(draft, error, job)
        except Exception as error:  # user code runs in here; the error is reported, see below
            logger.exception("Exporting %s failed unexpectedly", job.path)
            report = _failed(draft, error, job)
        seconds = {key: round(value, 4) for key, value in watch.seconds.items()}
        report = replace(report, seconds=seconds)
        if not job.publish:
            return replace(report, path=None)
        try:
            return _reported(report, job)
        finally:
            job.require_wanted()

    # --- refresh ----------------------------------------------------------------------------

    def _refresh(
        self, job: ExportJob, draft: ExportReport, watch: Stopwatch
    ) -> tuple[ExportReport | None, tuple[Attempt, ...]]:
        """Return the report of a refresh; or none, and the attempt, if there must be an export."""
        known = self.blueprint
        if known is None:
            return None, ()
        before = known.fingerprint
        core, start = known.rung.core.name, time.perf_counter()
        attempt = Attempt(core=core, variant="refresh", ok=True, reason="", seconds=0.0)
        try:
            with _wanted(job) as staged:
                made = refresh(
                    known,
                    job,
                    staged,
                    self._prep,
                    lambda digest: dict(known.metadata) | origin_of(job, digest),
                    watch.stage,
                )
                if job.template is not None and (
                    known.fingerprint is not before or not job.template.exists()
                ):
                    save_blueprint(known, job.template)
                report = replace(
                    draft,
                    ok=True,
                    how="refresh",
                    path=str(job.path),
                    core=core,
                    opset=known.report.opset,
                    inputs=known.report.inputs,
                    outputs=known.report.outputs,
                    evidence=known.report.evidence,
                    bytes=size_of_model(staged),
                    placements=known.report.placements,
                    latencies=known.report.latencies,
                    weights_sha256=made.weights_sha256,
                    checks=made.checks,
                    warnings=tuple(dict.fromkeys((*known.report.warnings, *made.warnings))),
                )
                report = self._finish(job, staged, known.plan, made.cases, report, watch)
        except (StaleTemplateError, VerificationError) as error:
            self.blueprint = None
            reason = f"The graph of an earlier checkpoint is not right for this one: {error}"
            took = time.perf_counter() - start
            return None, (replace(attempt, ok=False, reason=reason, seconds=took),)
        attempt = replace(attempt, seconds=time.perf_counter() - start)
        return replace(report, attempts=(attempt,)), ()

    # --- export -----------------------------------------------------------------------------

    def _export(
        self, job: ExportJob, draft: ExportReport, watch: Stopwatch, before: Blueprint | None
    ) -> ExportReport:
        """Export; ``before`` is what was known until now."""
        with ThreadPoolExecutor(1) as pool:  # hashing and the disk leave Python to others
            digest = pool.submit(weights_sha256, job.source.state())
            if isinstance(job.source, GivenModule):
                digest.result()  # before the module runs: it may write to its own weights
            report = self._export_beside(job, draft, watch, before, digest, pool)
            return replace(report, weights_sha256=digest.result())

    def _export_beside(
        self,
        job: ExportJob,
        draft: ExportReport,
        watch: Stopwatch,
        before: Blueprint | None,
        digest: Future[str],
        pool: Executor,
    ) -> ExportReport:
        """Export while another thread works out the hash of the weights."""
        attempts: list[Attempt] = list(draft.attempts)
        failures: list[FailedAttempt] = []
        climbed, flat = Climb(), None
        for plan in _plans(job, attempts, watch):
            if plan.flat is not flat:  # in another precision all may go otherwise
                climbed, flat = Climb(patches=climbed.patches), plan.flat
            with watch.stage("reference"):
                proof = Proof(plan, job.options.verify)
            draft = replace(
                draft,
                inputs=plan.signature.inputs,
                outputs=plan.signature.outputs,
                evidence=plan.axes.evidence,
                warnings=(*plan.warnings, *proof.warnings),
            )
            with _wanted(job) as staged:
                candidate = Candidate(job, plan, proof, staged, watch, self._prep, digest, pool)
                climbed = self._climb(candidate, climbed)
                attempts += climbed.attempts
                failures += climbed.failures
                draft = replace(draft, attempts=tuple(attempts), checks=climbed.checks)
                if climbed.winner is None:
                    continue
                draft = replace(
                    draft,
                    core=climbed.winner.core.name,
                    opset=candidate.verdict.opset,
                    placements=candidate.verdict.placements,
                    bytes=size_of_model(staged),
                    warnings=(*draft.warnings, *climbed.warnings, *candidate.verdict.warnings),
                )
                draft = candidate.measured(draft)
                with watch.stage("template"):
                    self.blueprint, reason = candidate.blueprint(climbed.winner, draft)
                    if before is not None and self.blueprint is not None:
                        self.blueprint.learn_from(before)
                    if job.template is not None:
                        save_blueprint(self.blueprint, job.template)
                self.row = one_row(plan)
                candidate.wait_for_disk()
                self._speeds = {}
                draft = self._finish(job, staged, plan, proof.cases, draft, watch)
            warnings = (*draft.warnings, reason) if reason else draft.warnings
            return replace(draft, ok=True, path=str(job.path), warnings=warnings)
        error = ExportError(_no_core(draft) + self._reproduce(job, plan, failures))
        return _failed(draft, error, job)

    def _finish(
        self,
        job: ExportJob,
        staged: Path,
        plan: Plan,
        cases: Sequence[Case],
        report: ExportReport,
        watch: Stopwatch,
    ) -> ExportReport:
        """Do with a proven model what else is asked for, and publish it with its children."""
        if not job.publish:
            return report
        metrics, parity = MetricRun(job), None
        made: tuple[Variant, ...] = ()
        children = Variants(job, staged, plan, metrics)
        if job.validation is not None:
            with watch.stage(VALIDATE):
                self.tell(VALIDATE, VALIDATE)  # if it ends this process, it is left out next time
                parity = metrics.of(staged, plan.signature, plan.flat.spec)
        if job.options.variants:
            with watch.stage("variants"):
                made = children.made(cases, self._speeds)
        with watch.stage("publish"):
            publish(staged, job.path)
            shutil.rmtree(reproduction_path(job.path), ignore_errors=True)
            made = children.publish(made)
        doubts = (*_doubt(parity), *(_failed_child(each) for each in made if not each.ok))
        return replace(
            report,
            metric_parity=parity,
            variants=made,
            warnings=tuple(dict.fromkeys((*report.warnings, *doubts))),
        )

    def _reproduce(self, job: ExportJob, plan: Plan, failures: Sequence[FailedAttempt]) -> str:
        """Write what repeats the failure, once per run: it holds the module's weights."""
        job.require_wanted()  # else the files were taken away, and nothing has failed
        if self._reproduced:
            return ""
        request = plan.request(job.options.opset)
        folder = write_reproduction(reproduction_path(job.path), request, failures)
        self._reproduced = folder is not None
        if folder is None:
            return ""
        how = "" if loads_module(folder) else ", once its load_module() says how the module is made"
        return f"{TO_REPEAT}{folder}/reproduce.py{how}"

    def _climb(self, candidate: Candidate, before: Climb) -> Climb:
        """Try the rungs on one plan; the proven model is staged when one won.

        What was learnt from the plan before it is not tried again.
        """
        job, plan = candidate.job, candidate.plan
        core, key = job.options.core, model_key(plan.flat)
        first = self._winners.get(key) or self._memory.recall(key, core)
        with candidate.watch.stage("export"):
            climbed = climb(
                [rung for rung in rungs(core, first) if rung.key not in job.skip],
                plan.request(job.options.opset),
                candidate.prove,
                skip=before.hopeless | _wrong_as_seen(plan, before),
                patches=before.patches,
                trusted=first,
                announce=lambda rung: self.tell("export", rung.key),
            )
        climbed.hopeless |= before.hopeless
        if climbed.winner is not None and climbed.winner != self._winners.get(key):
            self._winners[key] = climbed.winner
            self._memory.remember(key, core, climbed.winner)
        return climbed


def _doubt(parity: MetricParity | None) -> tuple[str, ...]:
    if parity is None or parity.ok:
        return ()
    return (f"The module's own validation does not speak for the model: {parity.reason}",)


def _failed_child(variant: Variant) -> str:
    return f"There is no {variant.name} variant: {variant.error}"


def _plans(job: ExportJob, attempts: Sequence[Attempt], watch: Stopwatch) -> Iterator[Plan]:
    """Yield the plan that asks for most, then those that ask for less, while none succeeds."""
    with watch.stage("plan"):
        plan = make_plan(job)
    yield plan
    if any(_lacks_kernel(attempt) for attempt in attempts) and job.options.precision is None:
        # ONNX Runtime's CPU provider lacks many kernels for other types than float32.
        text = "ONNX Runtime lacks a kernel for the weights' type: exported as float32."
        options = replace(job.options, precision="fp32")
        with watch.stage("plan"):
            plan = make_plan(replace(job, options=options))
        plan = replace(plan, warnings=(*plan.warnings, text))
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
    return ExportReport.begun(job.provenance, target_text(job.target))


def _no_core(report: ExportReport) -> str:
    cores: dict[str, list[str]] = {}
    for attempt in report.attempts:
        name = f"{attempt.core}{f' ({attempt.variant})' if attempt.variant else ''}"
        cores.setdefault(attempt.reason, []).append(name)
    tried = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in cores.items())
    return f"No core produced a model that passed the proof; one that does is enough. {tried}"


def _reported(report: ExportReport, job: ExportJob) -> ExportReport:
    """Write the report beside the model; where that, or the model, has failed, none is left.

    Raises:
        CheckpointGoneError: If the checkpoint has changed meanwhile.
    """
    published = report.ok
    if published:
        try:
            write_report(report, job.path, job.require_wanted)
        except OnnxportError as error:
            report = report.failed(error)
    if not report.ok:
        job.require_wanted()
        report = discard_stale(report, job.path, known=published)
        save_report(report, job.path)
    return report


def _failed(draft: ExportReport, error: BaseException, job: ExportJob) -> ExportReport:
    """Return the report of a failure; too little memory, or a bad disk, is none of the module."""
    report = draft.failed(error)
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    tried = [attempt.reason for attempt in draft.attempts]
    tried += [f"{type(each).__name__}: {each}" for each in chain]
    if any("MemoryError" in text for text in tried):
        return replace(report, code=WorkerError.code)
    folder = str(job.path.parent)  # also of what is staged
    if any("[Errno " in text and folder in text for text in tried):
        return replace(report, code=PublishError.code)
    return report


@contextmanager
def _wanted(job: ExportJob) -> Iterator[Path]:
    """Give the path of a file that can be published, unless the checkpoint changes meanwhile.

    Who changes it makes the ticket void, then removes what is staged. So a file that is staged
    before the ticket is looked at cannot get its final name afterwards.

    Raises:
        CheckpointGoneError: If it has changed already.
        PublishError: If nothing can be written there.
    """
    with staging(job.path) as staged:
        staged.touch()
        job.require_wanted()
        if job.ticket is not None:
            _keep(job.ticket.path)
        yield staged


def _keep(note: Path) -> None:
    """Bring a note to the disk that training has written and did not wait for."""
    with suppress(OSError):  # withdrawn a moment ago; or the model says that the disk fails
        sync(note)
        sync(note.parent)
