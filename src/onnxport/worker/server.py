"""The worker process: ``python -m onnxport.worker.server <descriptor>``.

It is started as a program of its own, so that the user's script never runs again. It gets modules
by value and weights as mapped files, runs the same pipeline that runs inline, and may crash, hang
or run out of memory: the trainer only sees that it is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import pickle
import queue
import resource
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport._files import identity_of
from onnxport._signals import ignore
from onnxport.worker.protocol import (
    Done,
    Ready,
    SentJob,
    Setup,
    StageBegun,
    WeightsFile,
    receive,
    send,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from onnxport.exporter.target import Target
    from onnxport.pipeline import Pipeline
    from onnxport.report import ExportReport
    from onnxport.tree import Example

__all__ = ["main"]

logger = logging.getLogger("onnxport.worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class _SentModule:
    """A module and weights that were sent, as the source of a job."""

    skeleton: bytes | None
    weights: WeightsFile
    path: Path

    def state(self) -> Mapping[str, Any]:
        """Map the checkpoint's ``state_dict``.

        Raises:
            CheckpointGoneError: If the file is not there, or another has its name.
        """
        from onnxport.exporter.checkpoint_file import read_state_dict
        from onnxport.pipeline import CheckpointGoneError

        try:
            if self.weights.identity and identity_of(self.path) != self.weights.identity:
                raise CheckpointGoneError
            return read_state_dict(self.path, self.weights.key)
        except FileNotFoundError:
            raise CheckpointGoneError from None

    def module(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Make the module, with these weights.

        Raises:
            ModuleMissingError: If it was never sent.
        """
        from onnxport.exporter.skeleton import with_weights
        from onnxport.pipeline import ModuleMissingError

        if self.skeleton is None:
            raise ModuleMissingError
        return with_weights(self.skeleton, self.state())


@dataclass(slots=True)
class _Session:
    """What the worker keeps of one run and target."""

    pipeline: Pipeline
    skeleton: bytes | None = None
    examples: tuple[Example, ...] = ()
    target: Target = ""
    batches: _Descriptor | None = None

    def forget_batches(self) -> None:
        """Let go of the file of batches."""
        if self.batches is not None:
            os.close(self.batches.number)
            self.batches = None


@dataclass(frozen=True, slots=True)
class _Descriptor:
    """A file that was sent."""

    number: int

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.number


@dataclass(slots=True)
class _Server:
    """Runs one job after the other."""

    channel: socket.socket
    sessions: dict[str, _Session] = field(default_factory=dict)

    def serve(self, jobs: queue.SimpleQueue[tuple[bytes, tuple[int, ...]]]) -> None:
        """Run jobs for ever; the reader ends the process."""
        while True:
            body, descriptors = jobs.get()
            try:
                self._handle(body, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _handle(self, body: bytes, descriptors: tuple[int, ...]) -> None:
        from onnxport.pipeline import CheckpointGoneError, ModuleMissingError

        job: SentJob = pickle.loads(body)  # nosec # noqa: S301 - the trainer, by a private socket
        try:
            report, session = self._run(job, descriptors)
            if report is None or report.how == "export":
                _give_back_memory()
        except CheckpointGoneError:
            send(self.channel, Done(job.number, None))
            return
        except ModuleMissingError:
            send(self.channel, Done(job.number, None, lacks_module=True))
            return
        known = session.pipeline.blueprint
        example = None if known is None else known.example
        message = Done(job.number, report, example, session.pipeline.row)
        try:
            body = pickle.dumps(message, protocol=5)
        except Exception:  # noqa: BLE001 - an example of the user's own classes
            from onnxport.exporter.skeleton import pickle_by_value

            body = pickle_by_value(message)
        send(self.channel, body)

    def _run(
        self, job: SentJob, descriptors: tuple[int, ...]
    ) -> tuple[ExportReport | None, _Session]:
        from onnxport.pipeline import ExportJob, Pipeline, Validation

        session = self.sessions.get(job.session)
        if session is None:
            for other in self.sessions.values():  # of earlier fits, as far as anybody knows
                if other.pipeline.blueprint is not None:
                    other.pipeline.blueprint.opened.close()
                other.forget_batches()
            session = self.sessions[job.session] = _Session(Pipeline())
        session.pipeline.tell = lambda stage, rung: send(
            self.channel, StageBegun(job.number, stage, rung)
        )
        if job.skeleton is not None:
            session.skeleton = job.skeleton
        if job.calls is not None:
            session.target, session.examples = pickle.loads(job.calls)  # nosec # noqa: S301 - see above
        if job.blueprint is not None:
            session.pipeline.blueprint = pickle.loads(job.blueprint)  # nosec # noqa: S301 - see above
        if job.brings_batches:
            session.forget_batches()
            session.batches = _Descriptor(os.dup(descriptors[-1]))
        validation = None
        if job.validation is not None and session.batches is not None:
            run, count = job.validation
            validation = Validation(run, session.batches, count)
        source = job.weights.path or Path(f"/dev/fd/{descriptors[0]}")
        report = session.pipeline.run(
            ExportJob(
                source=_SentModule(skeleton=session.skeleton, weights=job.weights, path=source),
                examples=session.examples,
                path=job.path,
                options=job.options,
                target=session.target,
                provenance=job.provenance,
                reference=job.reference,
                fingerprint=job.fingerprint,
                skip=job.skip,
                publish=not job.only_try,
                template=job.template,
                then=job.then,
                ticket=job.ticket,
                validation=validation,
            )
        )
        gone = job.weights.path is not None and not job.weights.path.exists()
        if gone and report.ok:
            from onnxport.exporter.writer import remove_model

            remove_model(job.path)
            return None, session
        return report, session


def _read(channel: socket.socket, jobs: queue.SimpleQueue[tuple[bytes, tuple[int, ...]]]) -> None:
    """Read frames; when the trainer is gone, so is the worker, whatever it is doing."""
    while True:
        try:
            message = receive(channel)
        except (OSError, EOFError):
            message = None
        if message is None:
            os._exit(0)
        jobs.put(message)


def _set_up(setup: Setup) -> None:
    sys.path[:] = list(setup.sys_path)
    os.nice(setup.niceness)
    if setup.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
    logging.getLogger("onnxport").setLevel(setup.log_level)


def _give_back_memory() -> None:
    """Let go of cycles that hold weights, and of holes in the heap: the next job may be far."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
    except (OSError, AttributeError):
        logger.debug("The system has no malloc_trim.")


def _preload(names: Sequence[str]) -> None:
    """Import where the classes of the module are defined: a job's module would need them."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # user code runs in here
            logger.debug("%s cannot be imported.", name, exc_info=True)


def _rehearse() -> None:
    """Export something tiny: exporters import and register much when they are first used."""
    import torch

    import onnxport

    with tempfile.TemporaryDirectory(prefix="onnxport-") as folder:
        try:
            onnxport.export(
                torch.nn.Linear(2, 2), torch.zeros(3, 2), Path(folder) / "x.onnx", core="dynamo"
            )
        except Exception:
            logger.debug("The rehearsal failed; the first job will tell why.", exc_info=True)


def _die_with_parent() -> None:
    """Ask Linux to end this process with the thread that started it."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        logger.debug("The system has no prctl; the socket tells when the trainer is gone.")


def main(descriptor: int) -> None:
    """Serve the trainer at the other end of a socket.

    Args:
        descriptor: The open socket.
    """
    _die_with_parent()
    faulthandler.enable()
    ignore()
    channel = socket.socket(fileno=descriptor)
    first = receive(channel)
    if first is None:
        return
    setup: Setup = pickle.loads(first[0])  # nosec # noqa: S301 - the trainer, by a private socket
    _set_up(setup)
    jobs: queue.SimpleQueue[tuple[bytes, tuple[int, ...]]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, jobs), daemon=True).start()

    import torch

    import onnxport.validation.session as runtime

    torch.set_num_threads(setup.threads)
    runtime.require_runtime()
    runtime.use_threads(setup.threads)
    send(channel, Ready(os.getpid()))
    _preload(setup.preload)
    if jobs.empty():
        _rehearse()
    _Server(channel).serve(jobs)


if __name__ == "__main__":
    main(int(sys.argv[1]))
