"""Where models are made: in the worker, or right here."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import torch

from onnxport.errors import ExportError, WorkerError
from onnxport.exporter.shared_weights import shared_descriptor
from onnxport.exporter.skeleton import NotPicklableError, make_skeleton, pickle_by_value
from onnxport.pipeline import CheckpointGoneError, Pipeline
from onnxport.report import ExportReport
from onnxport.worker.client import Order, worker_for
from onnxport.worker.protocol import Done, SentJob, WeightsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import nn

    from onnxport.callbacks.live import LiveModule
    from onnxport.config import Background
    from onnxport.pipeline import ExportJob
    from onnxport.report import Provenance
    from onnxport.tree import Example

    Finished = Callable[["Outcome"], None]

__all__ = ["InlineRunner", "Outcome", "Runner", "WorkerRunner"]

_numbers = count()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job.

    Args:
        report: The report, or ``None``: the checkpoint is gone.
        example: A small example of the model's inputs, if there is one.
        row: One row for each input, by name, if it is small.
    """

    report: ExportReport | None
    example: Example | None = None
    row: Mapping[str, np.ndarray[Any, Any]] | None = None


class Runner(Protocol):
    """Makes models of jobs."""

    def run(self, job: ExportJob, live: LiveModule, file: Path | None, finished: Finished) -> None:
        """Begin a job.

        Args:
            job: The job.
            live: Its source.
            file: The checkpoint's file, if the weights can be read from it.
            finished: Called, perhaps by another thread, with what came of it. Must not raise.
        """
        ...

    def forget(self, path: Path) -> None:
        """The checkpoint of this model was removed."""
        ...

    def unfinished(self) -> list[str]:
        """Return what each job is doing that was begun and not finished."""
        ...

    def wait(self, limit_s: float, tell: Callable[[list[str]], None]) -> list[Path]:
        """Wait until all is done, or give up what is not; return the models that are missing."""
        ...

    def close(self) -> None:
        """Training is over; there may still be a job, but no hurry."""
        ...


class InlineRunner:
    """Does the work at once, where it is asked for."""

    def __init__(self) -> None:
        self._pipeline = Pipeline()

    def run(
        self,
        job: ExportJob,
        live: LiveModule,  # noqa: ARG002 - the job's own source is the same
        file: Path | None,  # noqa: ARG002 - the weights are in memory
        finished: Finished,
    ) -> None:
        """See :class:`Runner`."""
        try:
            report = self._pipeline.run(job)
        except CheckpointGoneError:  # a signal's handler has saved it anew meanwhile
            finished(Outcome(None))
            return
        finished(_outcome(report, self._pipeline))

    def forget(self, path: Path) -> None:
        """Do nothing: all is done."""

    def unfinished(self) -> list[str]:
        """Return nothing."""
        return []

    def wait(self, limit_s: float, tell: Callable[[list[str]], None]) -> list[Path]:  # noqa: ARG002
        """Return nothing."""
        return []

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """What was sent last, to be sent again only when it is different."""

    fingerprint: Mapping[str, str] | None = None
    skeleton: bytes | None = None
    count: int = 0
    calls: bytes | None = None


class WorkerRunner:
    """Hands jobs to a worker process.

    Args:
        options: How it should live.
        module: The live module, for what of it the worker will have to import.
        place: Which session of the run this is.
    """

    def __init__(self, options: Background, module: nn.Module, place: int = 0) -> None:
        self._worker = worker_for(options, place)
        self._session = f"{os.getpid()}-{next(_numbers)}"
        self._sent = _Sent()
        self._inline: Pipeline | None = None
        self._blueprint: bytes | None = None
        self._worker.open(self._session, _modules_of(module))

    def run(self, job: ExportJob, live: LiveModule, file: Path | None, finished: Finished) -> None:
        """See :class:`Runner`. Takes as long as one copy of what is no weight, if that changed."""
        try:
            self._note(job, live)
        except NotPicklableError:
            if self._blueprint is None:
                self._capture(job, finished)
                return
        weights = None if file is not None else _copied(job.source.state())
        place = WeightsFile(path=None) if file is None else WeightsFile.of_checkpoint(file)
        sent = SentJob(
            number=next(_numbers),
            session=self._session,
            weights=place,
            path=job.path,
            options=replace(job.options, inputs=replace(job.options.inputs, example=None)),
            provenance=job.provenance,
            reference=job.reference,
            fingerprint=None if job.fingerprint is None else dict(job.fingerprint),
            skeleton=self._sent.skeleton,
            calls=self._sent.calls,
            blueprint=self._blueprint,
            only_try=not job.publish,
            template=job.template,
            then=None if job.then is None else dict(job.then),
            ticket=job.ticket,
            validation=None
            if job.validation is None
            else (job.validation.run, job.validation.count),
        )
        origin = job.provenance  # not the job, which holds the weights
        batches = None if job.validation is None else job.validation.batches
        self._worker.submit(
            Order(sent, lambda result: self._answered(origin, result, finished), weights, batches)
        )

    def _note(self, job: ExportJob, live: LiveModule) -> None:
        """Make the skeleton, and pickle the calls, if they are other than before."""
        sent = self._sent
        if sent.calls is None or sent.count != len(job.examples):
            calls = pickle_by_value((job.target, job.examples))
            sent = replace(sent, count=len(job.examples), calls=calls)
        if sent.skeleton is None or sent.fingerprint != job.fingerprint:
            skeleton = make_skeleton(live.live, live.saved, without=live.idle)
            sent = replace(sent, fingerprint=job.fingerprint, skeleton=skeleton)
        self._sent = sent

    def _capture(self, job: ExportJob, finished: Finished) -> None:
        """Export here what cannot be sent; the worker fills in the weights of later checkpoints."""
        pipeline = self._inline = self._inline or Pipeline()
        report = pipeline.run(job)
        known = pipeline.blueprint
        if known is not None:
            try:
                self._blueprint = pickle_by_value(known)
                self._sent = replace(self._sent, calls=pickle_by_value((job.target, ())))
            except NotPicklableError:
                self._blueprint = None
        finished(_outcome(report, pipeline))

    def _answered(self, origin: Provenance, result: Done | WorkerError, finished: Finished) -> None:
        if isinstance(result, Done) and not result.lacks_module:
            finished(Outcome(result.report, result.example, result.row))
            return
        text = str(result)
        if isinstance(result, Done):
            self._blueprint = self._inline = None
            text = (
                "The module has changed since it was exported and cannot be sent to the worker. "
                "The next checkpoint is exported in the training process."
            )
        code = ExportError.code if isinstance(result, Done) else WorkerError.code
        finished(Outcome(ExportReport.of_failure(text, origin, code)))

    def forget(self, path: Path) -> None:
        """Drop what waits for this model."""
        self._worker.forget(path)

    def unfinished(self) -> list[str]:
        """Return the stage of each order."""
        return _stages(self._worker.unfinished(self._session))

    def wait(self, limit_s: float, tell: Callable[[list[str]], None]) -> list[Path]:
        """Wait for the orders of this session; what is left after that is given up."""
        left = self._worker.wait(self._session, limit_s, lambda orders: tell(_stages(orders)))
        if left:
            self._worker.abandon(self._session)
        return [order.job.path for order in left if not order.job.only_try]

    def close(self) -> None:
        """Let the worker go when it has nothing to do."""
        self._worker.leave(self._session)


def _stages(orders: Sequence[Order]) -> list[str]:
    """Return what is being done for each model; a trial becomes none, unless it is all there is."""
    models = [order for order in orders if not order.job.only_try]
    return [order.stage for order in models or orders]


def _outcome(report: ExportReport, pipeline: Pipeline) -> Outcome:
    known = pipeline.blueprint
    return Outcome(report, None if known is None else known.example, pipeline.row)


def _modules_of(module: nn.Module) -> set[str]:
    """Return where the classes of a module and its parts are defined."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    return {kind.__module__ for kind in kinds} - {"builtins", "__main__"}


def _copied(state: Mapping[str, Any]) -> int:
    """Copy weights into memory that another process can map; return its descriptor."""
    shared = shared_descriptor(state)
    if shared is not None:  # they were gathered there
        return shared
    tensors = {
        name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)
    }
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("onnxport")
        # By its path torch writes to it directly; given a file object it copies each tensor first.
        torch.save(tensors, f"/proc/self/fd/{descriptor}")
        return descriptor
    with tempfile.TemporaryFile() as file:
        torch.save(tensors, file)
        return os.dup(file.fileno())
