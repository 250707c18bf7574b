"""The trainer's side of the worker: a queue, and a thread that looks after one process.

Handing over an order takes microseconds; everything that may block, fail or take long happens in
the thread, which never touches what training uses.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport._events import NOT_WANTED, event
from onnxport.errors import WorkerError
from onnxport.exporter.checkpoint_file import is_readable
from onnxport.exporter.skeleton import pickle_by_value
from onnxport.exporter.writer import remove_model
from onnxport.pipeline.job import VALIDATE
from onnxport.worker.aside import put_aside
from onnxport.worker.process import WorkerProcess
from onnxport.worker.protocol import Done, SentJob, StageBegun, WeightsFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnxport.config import Background
    from onnxport.pipeline.job import HasDescriptor

__all__ = ["Order", "Worker", "worker_for"]

logger = logging.getLogger(__name__)

IDLE_S = 20.0
"""A worker is ended so long after the last fit that used it; the next may need it at once."""

MAX_TRIES = 3
"""How often an order is tried when the worker dies over it."""

DEADLY = 2
"""A rung over which the worker died so often is not tried any more; once may be an accident."""

MAX_DEATHS = 6
"""Deaths in a row after which nothing more is tried."""

MAX_COPIES = 2
"""How many sets of weights may wait in memory."""

_TOO_MANY = (
    f"More than {MAX_COPIES} later checkpoints came while it waited, and its weights could not be "
    "put aside: {error}. Save less often, or export fewer with when=Cadence(...)."
)

CLOSE_LIMIT_S = 10.0
"""How long the end of the program waits for the thread."""

PAUSE_S = 0.2
"""How often a waiting trainer looks, in seconds."""


@dataclass(eq=False, slots=True)
class Order:
    """A job on its way.

    Args:
        job: The job, with everything in it.
        done: Called in the worker's thread with what came of it; must not raise.
        weights: A descriptor of the weights, which belongs to the order; ``None``: they lie in the
            checkpoint's file.
        batches: The file of batches that the job is validated with, or ``None``.
        stage: What is being done, in words.
        dropped: Nobody waits for the result.
        forgotten: The checkpoint is gone, and so must be the model.
        aside: The weights are on disk, or on their way there.
        problem: Why nothing can come of it, if that is known before its turn.
    """

    job: SentJob
    done: Callable[[Done | WorkerError], None]
    weights: int | None = None
    batches: HasDescriptor | None = None
    stage: str = "waiting"
    dropped: bool = False
    forgotten: bool = False
    aside: bool = False
    problem: WorkerError | None = None

    def finish(self, result: Done | WorkerError) -> None:
        """Hand out the result, once, and let go of the weights."""
        self.release()
        try:
            if self.forgotten:
                remove_model(self.job.path)  # published while its checkpoint was removed
            if not self.dropped:
                self.done(result)
        except Exception:  # the thread must go on
            logger.exception("What became of %s could not be noted.", self.job.path)

    def release(self) -> None:
        """Let go of the weights."""
        if self.weights is not None:
            os.close(self.weights)
            self.weights = None


@dataclass(slots=True)
class _Queue:
    """Orders that wait, and the one that is being done."""

    waiting: list[Order] = field(default_factory=list)
    current: Order | None = None


class Worker:
    """One process and the thread that looks after it; both come when there is work.

    Args:
        options: How the process should live.
    """

    def __init__(self, options: Background) -> None:
        self._options = options
        self._changed = threading.Condition()
        self._queue = _Queue()
        self._thread: threading.Thread | None = None
        self._process: WorkerProcess | None = None
        self._deaths = 0
        self._warm = False
        self._open: set[str] = set()
        self._preload: set[str] = set()
        self._deadly: Counter[tuple[str, str]] = Counter()
        self._proven: set[tuple[str, str]] = set()
        self._closing = False
        self._disk = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process's number, or ``None`` while there is none."""
        process = self._process
        return None if process is None else process.pid

    # --- called by the trainer ----------------------------------------------------------------

    def open(self, session: str, preload: Iterable[str] = ()) -> None:
        """A session begins: start the process, whose imports take seconds, and keep it.

        It knows the graph; without it the next checkpoint would have to be exported.

        Args:
            session: The session.
            preload: Modules that its jobs will need.
        """
        with self._changed:
            self._preload.update(preload)
            self._open.add(session)
            self._deaths = 0  # of an earlier run
            self._warm = True
            self._ensure_thread()
            self._changed.notify_all()

    def leave(self, session: str) -> None:
        """A session is over: without work the process ends soon."""
        with self._changed:
            self._open.discard(session)
            self._changed.notify_all()

    def submit(self, order: Order) -> None:
        """Queue an order. A waiting one for the same file is dropped: its weights are older."""
        with self._changed:
            self._drop_waiting(order.job.path)
            self._queue.waiting.append(order)
            self._spare_memory()
            self._ensure_thread()
            self._changed.notify_all()

    def forget(self, path: Path) -> None:
        """A checkpoint was removed: what waits for its model is dropped, with no report."""
        with self._changed:
            self._drop_waiting(path)
            current = self._queue.current
            if current is not None and current.job.path == path:
                if not current.dropped:
                    _say_dropped(current)
                current.dropped = current.forgotten = True

    def unfinished(self, session: str | None = None) -> list[Order]:
        """Return the orders that are not done, the current one first."""
        with self._changed:
            queue = self._queue
            orders = [*([queue.current] if queue.current else []), *queue.waiting]
        return [
            order for order in orders if not order.dropped and session in {None, order.job.session}
        ]

    def wait(
        self, session: str, limit_s: float, tell: Callable[[list[Order]], None] = lambda _: None
    ) -> list[Order]:
        """Wait until a session's orders are done.

        Args:
            session: The session.
            limit_s: How long at most, in seconds.
            tell: Called now and then with what is left.

        Returns:
            What is left then.
        """
        end = time.monotonic() + limit_s
        while (left := self.unfinished(session)) and time.monotonic() < end:
            tell(left)
            with self._changed:
                self._changed.wait(min(PAUSE_S, max(0.0, end - time.monotonic())))
        return left

    def abandon(self, session: str) -> None:
        """Give up a session's orders: they are not done, and the process ends over the current."""
        with self._changed:
            orders = [order for order in self._queue.waiting if order.job.session == session]
            for order in orders:
                self._queue.waiting.remove(order)
            current = self._queue.current
            mine = current is not None and current.job.session == session
            if mine and current is not None:
                current.dropped = True
        for order in orders:
            order.dropped = True
            order.finish(WorkerError("abandoned"))
        process = self._process
        if mine and process is not None:
            process.end()

    def close(self) -> None:
        """End the process now, and wait for the thread; nothing more is done."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        process = self._process
        if process is not None:
            process.end()
        if thread is not None:
            # A thread that outlives the interpreter ends the program with an error of C++.
            thread.join(CLOSE_LIMIT_S)

    # --- in the thread ------------------------------------------------------------------------

    def _ensure_thread(self) -> None:
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._look_after, daemon=True, name="onnxport")
            self._thread.start()

    def _spare_memory(self) -> None:
        """Copies of weights must not pile up: by now a checkpoint may be there to be read."""
        # Trials, and weights of no checkpoint, come once.
        copies = [
            order
            for order in self._queue.waiting
            if order.weights is not None and order.job.provenance.checkpoint and not order.aside
        ]
        for order in copies[:-MAX_COPIES]:
            checkpoint = Path(str(order.job.provenance.checkpoint))
            if is_readable(checkpoint):
                order.release()
                order.job = replace(order.job, weights=WeightsFile.of_checkpoint(checkpoint))
            elif order.weights is not None:  # on a remote file system
                order.aside = True
                mine = (order, os.dup(order.weights))
                threading.Thread(target=self._put_aside, args=mine, daemon=True).start()

    def _put_aside(self, order: Order, weights: int) -> None:
        """Copy weights that wait to disk, in a thread of its own.

        Args:
            order: The order, whose turn may come meanwhile.
            weights: A descriptor of its weights for this thread, which closes it.
        """
        copy, problem = None, None
        with self._disk:
            try:
                if order.weights is not None:
                    copy = put_aside(weights, order.job.path.parent)
            except (WorkerError, OSError) as error:
                problem = WorkerError(_TOO_MANY.format(error=error))
            finally:
                os.close(weights)
        with self._changed:
            if order in self._queue.waiting:
                order.release()
                order.weights, order.problem = copy, problem
            elif copy is not None:
                os.close(copy)

    def _drop_waiting(self, path: Path) -> None:
        for order in [order for order in self._queue.waiting if order.job.path == path]:
            self._queue.waiting.remove(order)
            order.dropped = True
            order.finish(WorkerError("dropped"))
            _say_dropped(order)

    def _look_after(self) -> None:
        try:
            while (order := self._next()) is not None:
                result = self._safely(order)
                with self._changed:
                    order.stage = "done"
                order.finish(result)
                with self._changed:
                    self._queue.current = None
                    self._changed.notify_all()
        finally:
            self._retire()

    def _retire(self) -> None:
        """End the thread. In one step with letting go of the process: another thread may begin."""
        with self._changed:
            process, self._process, self._thread = self._process, None, None
            self._queue.current = None
            if self._queue.waiting:
                self._ensure_thread()
        if process is not None:
            process.close()

    def _next(self) -> Order | None:
        """Return the oldest order; ``None`` when there was none for long."""
        with self._changed:
            warm, self._warm = self._warm, False
        if warm:
            self._try_to_start()
        with self._changed:
            end = time.monotonic() + IDLE_S
            while not self._queue.waiting and not self._closing and time.monotonic() < end:
                self._changed.wait(None if self._open else end - time.monotonic())
                if self._open:
                    end = time.monotonic() + IDLE_S
            if self._closing or not self._queue.waiting:
                return None
            self._queue.current = self._queue.waiting.pop(0)
            return self._queue.current

    def _try_to_start(self) -> None:
        try:
            self._process = self._process or WorkerProcess(self._options, sorted(self._preload))
        except (WorkerError, OSError):
            logger.debug("The worker did not start; the first order tries again.", exc_info=True)

    def _safely(self, order: Order) -> Done | WorkerError:
        try:
            return self._carry_out(order)
        except Exception as error:  # what cannot be pickled, a full disk: the thread must go on
            logger.debug("An order failed", exc_info=True)
            return WorkerError(f"The worker was not given its work: {error}")

    def _carry_out(self, order: Order) -> Done | WorkerError:
        if order.problem is not None:
            return order.problem
        error = WorkerError("The worker process was ended.")
        for _ in range(MAX_TRIES):
            if self._deaths >= MAX_DEATHS:
                return WorkerError(
                    f"The worker process died {self._deaths} times in a row, so no more models are "
                    f"made in this run. Last: {error} Another core= may avoid it."
                )
            try:
                return self._work_on(order)
            except (WorkerError, OSError) as problem:
                error = problem if isinstance(problem, WorkerError) else WorkerError(str(problem))
                process, self._process = self._process, None
                if process is not None:
                    process.kill()
                if order.dropped or self._closing:
                    break
                self._deaths += 1
                logger.debug("The worker died during %s: %s", order.stage, error)
        return error

    def _work_on(self, order: Order) -> Done:
        """Send an order and wait for its result.

        Raises:
            WorkerError: If the worker dies or hangs; the rung it was at is skipped from then on, if
                it has never made a model.
        """
        process = self._process = self._process or WorkerProcess(
            self._options, sorted(self._preload)
        )
        job = order.job
        known = process.known.get(job.session, {})
        parts: dict[str, Any] = {
            "skeleton": job.skeleton,
            "calls": job.calls,
            "blueprint": job.blueprint,
            "batches": order.batches or known.get("batches"),
        }
        new: dict[str, Any] = {
            name: None if known.get(name) is part else part for name, part in parts.items()
        }
        deadly = {
            rung
            for (session, rung), count in self._deadly.items()
            if session == job.session and count >= DEADLY
        }
        skip = job.skip | deadly
        batches = new.pop("batches")
        sent = replace(job, skip=skip, brings_batches=batches is not None, **new)
        descriptors = () if order.weights is None else (order.weights,)
        if batches is not None:
            descriptors = (*descriptors, batches.fileno())
        process.send(pickle_by_value(sent), descriptors)
        process.known[job.session] = parts
        rung: str | None = None
        try:
            while True:
                message = process.receive(self._options.stage_timeout_s)
                if isinstance(message, Done) and message.number == job.number:
                    self._deaths = 0
                    if rung is not None and message.report is not None and message.report.ok:
                        self._proven.add((job.session, rung))
                    return _without_some(message, skip)
                if isinstance(message, StageBegun):
                    order.stage = message.stage
                    if message.rung == VALIDATE and rung is not None:
                        self._proven.add((job.session, rung))  # its model is validated
                    rung = message.rung if message.stage in {"export", VALIDATE} else rung
        except WorkerError:
            # A rung that has made a model is not what ends the worker: somebody else does.
            innocent = rung != VALIDATE and (job.session, rung) in self._proven
            if rung is not None and not innocent and not order.dropped:
                order.job = replace(job, skip=job.skip | {rung})
                self._deadly[job.session, rung] += 1
            raise


def _say_dropped(order: Order) -> None:
    if not order.job.only_try:
        event("model.dropped", model=order.job.path, reason=NOT_WANTED)


def _without_some(done: Done, skip: frozenset[str]) -> Done:
    """Say of a failure that rungs were left out: the worker's end is its reason, too."""
    report = done.report
    if report is None or report.ok or not skip:
        return done
    names = ", ".join(sorted(rung.rstrip("/") for rung in skip))
    ended = f"The worker process has ended in {names}, which was not tried again."
    error = f"{report.error} {ended}".replace("  ", " ")
    return replace(done, report=replace(report, error=error, code=WorkerError.code))


_WORKERS: dict[tuple[Background, int], Worker] = {}


def worker_for(options: Background, place: int) -> Worker:
    """Return the worker for the n-th session of a run; workers outlast a run for a moment.

    Args:
        options: How workers should live, and how many there may be.
        place: Which session it is.
    """
    key = (options, place % options.max_workers)
    return _WORKERS.setdefault(key, Worker(options))


def _close_all() -> None:
    for worker in tuple(_WORKERS.values()):
        worker.close()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    # A forked child has the memory of the threads and not the threads.
    os.register_at_fork(after_in_child=_WORKERS.clear)
