"""A model on its way from a core to a proof, and what the next checkpoint needs of it."""

from __future__ import annotations

import logging
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from onnxport.errors import ExportError, OnnxportError
from onnxport.exporter.target import target_text
from onnxport.exporter.template import make_template
from onnxport.exporter.writer import (
    drop_weights,
    finish_graph,
    sync_model,
    write_filled,
    write_whole,
)
from onnxport.pipeline.blueprint import Blueprint, plain_state
from onnxport.pipeline.completeness import why_incomplete
from onnxport.pipeline.open_template import OpenTemplate
from onnxport.pipeline.proof import REAL
from onnxport.pipeline.speed import measure
from onnxport.pipeline.verdict import Verdict
from onnxport.validation.session import runtime_version

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    import onnx_ir as ir

    from onnxport.exporter.ladder import Rung
    from onnxport.exporter.template import Template
    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.plan import Plan
    from onnxport.pipeline.proof import Proof
    from onnxport.pipeline.stopwatch import Stopwatch
    from onnxport.report import Check, ExportReport
    from onnxport.validation.session import PrepSessions

__all__ = ["Candidate", "origin_of"]

logger = logging.getLogger(__name__)


class Candidate:
    """One plan's models on their way to a proof.

    Args:
        job: The job.
        plan: What is exported.
        proof: Judges the models.
        staged: Where they are written.
        watch: Measures the stages.
        prep: Runs prep graphs.
        digest: Hash of the checkpoint's ``state_dict``, which is worked out meanwhile.
        pool: Brings files to the disk while they are proven.

    Attributes:
        verdict: What the proof says of the last model.
    """

    def __init__(
        self,
        job: ExportJob,
        plan: Plan,
        proof: Proof,
        staged: Path,
        watch: Stopwatch,
        prep: PrepSessions,
        digest: Future[str],
        pool: Executor,
    ) -> None:
        self.job, self.plan, self.watch = job, plan, watch
        self.verdict = Verdict()
        self._pool = pool
        self._synced: Future[None] | None = None
        self._proof, self._staged, self._prep, self._digest = proof, staged, prep, digest
        self._template: Template | None = None
        self._why_none = ""

    def prove(self, rung: Rung, model: ir.Model) -> tuple[Check, ...]:
        """Write a model and prove it.

        Raises:
            VerificationError: If it is wrong.
        """
        if self._synced is not None:
            wait([self._synced])  # it is about the file that is now written anew
        with self.watch.stage("write"):
            self._write(rung, model)
            drop_weights(model)
        self._synced = self._pool.submit(sync_model, self._staged)
        with self.watch.stage("prove"):
            self.verdict = self._proof.judge(self._staged, staged=True)
        return self.verdict.checks

    def measured(self, report: ExportReport) -> ExportReport:
        """Return a report with how long runs of the last model take, if that is asked for."""
        if not self.job.options.latency_s:
            return report
        with self.watch.stage("latency"):
            found, warning = measure(self._staged, self.plan, self.verdict.checks, self.job.options)
        said = (*report.warnings, warning) if warning else report.warnings
        return replace(report, latencies=found, warnings=said)

    def wait_for_disk(self) -> None:
        """Return when the last model is on the disk.

        Raises:
            PublishError: If the disk does not take it.
        """
        if self._synced is not None:
            with self.watch.stage("sync"):
                self._synced.result()

    def _write(self, rung: Rung, model: ir.Model) -> None:
        plan = self.plan
        weights = finish_graph(model, plan.signature, plan.flat.weight_names(plan.root))
        metadata = self._metadata(rung)
        state = plain_state(plan.root.state_dict())
        self._template, self._why_none = None, ""
        try:
            self._template = make_template(model, weights, state, self._prep)
        except Exception as error:  # an unknown element type, a graph of 2 GB: the model is fine
            logger.debug("There is no template", exc_info=True)
            reason = (
                str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
            )
            self._why_none = f"Each checkpoint of this module needs an export of its own: {reason}"
            write_whole(model, self._staged, metadata)
            return
        tensors = self._template.fill(state, self._prep)
        write_filled(self._template, self._staged, tensors, lambda: metadata, sync=False)

    def _metadata(self, rung: Rung) -> dict[str, object]:
        try:
            digest = self._digest.result()
        except Exception as error:  # no core is to blame
            raise ExportError(f"The weights cannot be hashed: {error}") from error
        return facts_of(self.job, self.plan, self._proof, rung) | origin_of(self.job, digest)

    def blueprint(self, rung: Rung, report: ExportReport) -> tuple[Blueprint | None, str]:
        """Return what the next checkpoint needs; or none, and why it needs an export of its own."""
        template, proof, plan = self._template, self._proof, self.plan
        if template is None:
            return None, self._why_none
        small = next(case.inputs for case in proof.cases if case.rows == REAL)
        tolerance = self.job.options.verify.tolerance
        opened = OpenTemplate(template)
        try:
            reason = why_incomplete(
                opened, plan, small, proof.noise, tolerance, self._staged.parent, self._prep
            )
        except OnnxportError as error:  # the disk is full, say: the model itself is proven
            reason = f"Whether other weights can be filled in could not be tried: {error}"
        if reason:
            return None, reason
        known = Blueprint.of(
            self.job,
            plan,
            opened,
            rung=rung,
            report=report,
            noise=proof.noise,
            metadata=facts_of(self.job, plan, proof, rung),
        )
        return known, ""


def facts_of(job: ExportJob, plan: Plan, proof: Proof, rung: Rung) -> dict[str, object]:
    """What the file itself says about how it was made, the same for each checkpoint."""
    from onnxport import __version__

    specs = (*plan.signature.inputs, *plan.signature.outputs)
    known: dict[str, Any] = {
        "version": __version__,
        "target": target_text(job.target) or None,
        "core": rung.core.name,
        "dynamic_axes": {spec.name: spec.dynamic_axes for spec in specs if spec.dynamic_axes},
        "error_budget": proof.budgets,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": runtime_version(),
    }
    return {key: value for key, value in known.items() if value is not None}


def origin_of(job: ExportJob, digest: str | None) -> dict[str, object]:
    """What the file itself says about which checkpoint it is of."""
    origin = job.provenance
    known: dict[str, Any] = {
        **origin.notes,
        "checkpoint": Path(origin.checkpoint).name if origin.checkpoint else None,
        "weights_sha256": digest,
        "epoch": origin.epoch,
        "global_step": origin.global_step,
        "metrics": {key: repr(value) for key, value in origin.metrics.items()},
    }
    return {key: value for key, value in known.items() if value is not None}
