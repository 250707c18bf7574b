"""Where training leaves what is to be told to a tracking server, and never waits for it."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onnxport._events import event
from onnxport._files import folder_to_start_in, is_there, read_small
from onnxport._signals import held_back
from onnxport.report import TrackingRecord
from onnxport.tracking.base import without_password
from onnxport.tracking.courier import Courier, hasty_tracker, with_password
from onnxport.tracking.job import job_path, model_of, read_job, save_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxport.tracking.base import RunAddress
    from onnxport.tracking.job import Job

    Told = Callable[[TrackingRecord], object]
    _Lines = queue.SimpleQueue[dict[str, Any] | None]

__all__ = ["InlineOutbox", "Outbox", "ProcessOutbox", "Unavailable"]

logger = logging.getLogger(__name__)

MAX_STARTS = 3
"""How often the process is started when it dies and has done nothing meanwhile."""
REST_S = 60.0
"""When it is started again after that, and not before: each start takes seconds of a core."""
PAUSE_S = 0.2
"""How often a waiting trainer looks, in seconds."""
END_LIMIT_S = 2.0
"""How long an idle process may take to end."""


class Outbox(Protocol):
    """Takes jobs; none of its methods raises but for Ctrl-C."""

    def submit(self, job: Job, told: Told) -> None:
        """Note a job, and begin it when it is its turn.

        Args:
            job: The job.
            told: Called, perhaps by another thread and more than once, with what the server holds.
                Must not raise.
        """
        ...

    def adopt(self, path: Path, told: Told) -> None:
        """Begin a job that an earlier run has left.

        Args:
            path: The job.
            told: See :meth:`submit`.
        """
        ...

    def drain(self, limit_s: float, tell: Callable[[int], None]) -> None:
        """Wait for what was begun; a server that was down is asked once more.

        Args:
            limit_s: How long at most, in seconds.
            tell: Called now and then with how many are left.
        """
        ...

    def close(self, status: str) -> None:
        """Training is over.

        Args:
            status: How: ``"FINISHED"`` or ``"FAILED"``.
        """
        ...


@dataclass(slots=True)
class _Entry:
    """A job that is noted and not done."""

    job: Job
    told: Told
    asked: bool = False
    """Whether there was an answer."""


class _Noted:
    """Jobs by the place of their models; a newer one replaces an older one."""

    def __init__(self, address: RunAddress) -> None:
        self._address = address
        self._entries: dict[Path, _Entry] = {}
        self._unnoted: dict[Path, tuple[Job, Told]] = {}

    def _note(self, job: Job, told: Told) -> TrackingRecord | None:
        """Write a job down; return what is to be told if the disk refuses."""
        self._unnoted.pop(job.model, None)
        try:
            path = save_job(job)
        except OSError as error:
            self._unnoted[job.model] = (job, told)
            uri = without_password(job.address.uri)
            text = f"it could not be noted beside {job.model}: {error.strerror or error}"
            return TrackingRecord(uri=uri, missing=text)
        self._entries[path] = _Entry(job, told)
        return None

    def _note_late(self) -> list[Path]:
        """Write down what could not be before; return what the disk takes now."""
        noted: list[Path] = []
        refused: set[Path] = set()
        for model, (job, told) in list(self._unnoted.items()):
            if model.parent in refused:  # each refusal takes time
                continue
            try:
                path = save_job(job)
            except OSError:
                refused.add(model.parent)
                continue
            self._entries[path] = _Entry(job, told)
            self._unnoted.pop(model, None)
            noted.append(path)
        return noted

    def _set_aside(self, path: Path) -> None:
        """Keep a job whose note is gone, though it was not carried out as far as anybody knows."""
        entry = self._entries.pop(path)
        self._unnoted[entry.job.model] = (entry.job, entry.told)

    def _take(self, path: Path, told: Told) -> bool:
        """Take a job that is noted already; the password of our own server is known."""
        try:
            job = read_job(path, read_small(path))
        except ValueError:
            logger.warning("%s cannot be understood: remove it.", path, exc_info=True)
            return False
        except OSError:
            logger.warning("%s cannot be read now; the next fit tries again.", path, exc_info=True)
            return False
        ours = job.address.uri == without_password(self._address.uri)
        uri = self._address.uri if ours else with_password(job.address.uri)
        job = replace(job, address=replace(job.address, uri=uri))
        return self._entries.setdefault(path, entry := _Entry(job, told)) is entry

    def _leave(self, status: str) -> None:
        """Note in what is left how the run has ended: whoever does it will end the run."""
        self._note_late()
        left = [path for path in self._entries if is_there(path)]
        if left or self._unnoted:
            models = [*map(model_of, left), *self._unnoted]
            logger.warning(
                "Not told to %s: %d of the models%s. `onnxport sync %s`, or the next fit with this "
                "checkpoint folder, does it.",
                without_password(self._address.uri),
                len(models),
                f", of which the disk lets us note {len(left)}" if self._unnoted else "",
                os.path.commonpath([model.parent for model in models]),
            )
        if not self._is_ours:
            return
        for entry in self._entries.values():
            same = entry.job.address.fit == self._address.fit
            if same and is_there(job_path(entry.job.model)):
                try:
                    save_job(replace(entry.job, ended=status))
                except OSError:
                    logger.debug("The job of %s stays as it is.", entry.job.model, exc_info=True)

    @property
    def _is_ours(self) -> bool:
        return self._address.run_id is None

    @property
    def _is_done(self) -> bool:
        return not self._entries and not self._unnoted


class InlineOutbox(_Noted):
    """Carries jobs out at once, where they are submitted.

    Once a server was found down, later jobs are only noted, until :meth:`drain`.

    Args:
        address: The run.
    """

    def __init__(self, address: RunAddress) -> None:
        super().__init__(address)
        self._courier = Courier(hasty_tracker)
        self._down: TrackingRecord | None = None

    def submit(self, job: Job, told: Told) -> None:
        """See :class:`Outbox`."""
        refused = self._note(job, told)
        if refused is not None:
            _tell(told, refused)
            return
        for path in (job_path(job.model), *self._note_late()):
            if self._down is not None:
                _tell(self._entries[path].told, self._down)
            else:
                self._carry_out(path)

    def adopt(self, path: Path, told: Told) -> None:
        """See :class:`Outbox`; training does not wait for what others have left."""
        self._take(path.absolute(), told)

    def _carry_out(self, path: Path) -> None:
        entry = self._entries[path]
        carried = self._courier.carry_out(path, entry.job.address.uri)
        if carried.down:
            self._down = carried.record
        if carried.damaged:
            self._set_aside(path)
        elif not carried.left:
            self._entries.pop(path, None)
        if carried.record is not None:
            _tell(entry.told, carried.record)

    def drain(self, limit_s: float, tell: Callable[[int], None]) -> None:  # noqa: ARG002
        """See :class:`Outbox`; all at once, so without a limit."""
        self._down = None
        self._note_late()
        paths = list(self._entries)
        for index, path in enumerate(paths):
            if self._down is not None:
                break  # asking again for each model would take long
            tell(len(paths) - index)
            self._carry_out(path)

    def close(self, status: str) -> None:
        """See :class:`Outbox`."""
        self._leave(status)
        if self._is_ours and self._is_done:
            self._courier.close(self._address, status)


class ProcessOutbox(_Noted):
    """Hands jobs to a process of its own.

    Args:
        address: The run.
    """

    def __init__(self, address: RunAddress) -> None:
        super().__init__(address)
        self._changed = threading.Condition()
        self._lines: _Lines = queue.SimpleQueue()
        self._starts = 0
        self._rests_until = 0.0
        self._ended = False
        self._closed = False
        self._process: subprocess.Popen[str] | None = None
        with self._changed:
            self._start()

    # --- called by the trainer, or by the thread that looks after the worker -----------------

    def submit(self, job: Job, told: Told) -> None:
        """See :class:`Outbox`; after :meth:`close` it is only noted, until :meth:`drain`."""
        with self._changed:
            refused = self._note(job, told)
            paths = [] if refused else [job_path(job.model), *self._note_late()]
        if refused is not None:
            _tell(told, refused)
        for path in paths:
            self._ask(path)

    def adopt(self, path: Path, told: Told) -> None:
        """See :class:`Outbox`."""
        path = path.absolute()  # as submitted jobs are: one note, one entry
        with self._changed:
            taken = self._take(path, told)
        if taken:
            self._ask(path)

    def drain(self, limit_s: float, tell: Callable[[int], None]) -> None:
        """See :class:`Outbox`; a checkpoint may be saved after the end, too."""
        end = time.monotonic() + limit_s
        self._open_again()
        self._ask_late()
        self._wait(end, tell)
        self._ask_late()  # what was found to be damaged meanwhile
        with self._changed:
            failed = list(self._entries)
            for path in failed:
                self._entries[path].asked = False
            self._rests_until = 0.0  # there is no later
        if failed:
            with self._changed:
                self._lines.put({"again": True})
            for path in failed:
                self._ask(path)
            self._wait(end, tell)
        self._give_up()

    def close(self, status: str) -> None:
        """See :class:`Outbox`."""
        with self._changed:
            self._closed = True
            process, lines = self._process, self._lines
        try:
            with self._changed:
                self._leave(status)
                ends = self._is_ours and self._is_done
            if ends and process is not None and process.poll() is None:
                self._end_run(status, lines)
        finally:
            lines.put(None)
            if process is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_LIMIT_S)
                process.kill()
                process.wait()

    def _end_run(self, status: str, lines: _Lines) -> None:
        lines.put({"address": asdict(self._address), "status": status})
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, END_LIMIT_S):
                uri = without_password(self._address.uri)
                logger.warning("%s was not told in time that the run has %s.", uri, status.lower())

    def _open_again(self) -> None:
        with self._changed:
            if not self._closed or self._is_done:
                return
            self._closed, self._ended, self._process, self._rests_until = False, False, None, 0.0
            noted = list(self._entries)
        for path in noted:
            self._ask(path)

    def _ask_late(self) -> None:
        with self._changed:
            late = self._note_late()
        for path in late:
            self._ask(path)

    def _ask(self, path: Path) -> None:
        with self._changed:
            entry = self._entries.get(path)
            if entry is None or self._closed:
                return
            asked = [path]
            if self._process is None and time.monotonic() >= self._rests_until:
                self._starts, self._lines, asked = 0, queue.SimpleQueue(), list(self._entries)
                self._start()
            gone = self._process is None
            for each in () if gone else asked:
                job = self._entries[each].job
                line = {"job": str(each), "uri": job.address.uri, "asked": job.token}
                self._lines.put(line)
        if gone:  # nobody will answer
            uri = without_password(entry.job.address.uri)
            text = f"the process that speaks to {uri} cannot be started, or has died too often"
            record = {"uri": uri, "missing": text}
            answer = {"job": str(path), "asked": entry.job.token, "record": record, "left": True}
            self._answered(answer)

    def _wait(self, end: float, tell: Callable[[int], None]) -> None:
        """Wait until there is an answer for each job."""
        while True:
            with self._changed:
                left = sum(not entry.asked for entry in self._entries.values())
                if not left or time.monotonic() >= end:
                    return
                self._changed.wait(min(PAUSE_S, max(0.0, end - time.monotonic())))
            tell(left)

    def _give_up(self) -> None:
        with self._changed:
            unanswered = [entry for entry in self._entries.values() if not entry.asked]
        for entry in unanswered:
            uri = without_password(self._address.uri)
            text = f"{uri} did not take it while training waited (Background(drain_s=))"
            _tell(entry.told, TrackingRecord(uri=uri, missing=text))

    # --- in threads -------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the process; a system that refuses is no reason to end training."""
        self._starts += 1
        self._process = None
        self._rests_until = time.monotonic() + REST_S
        process = None
        try:
            with held_back():
                process = subprocess.Popen(  # nosec
                    [sys.executable, "-m", "onnxport.tracking.server"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=folder_to_start_in(),
                    start_new_session=True,
                )
            self._process = process
            event("courier.started", courier=process.pid)
            # The queue is given: when the thread looks, it may be that of the next process.
            for work, given in ((self._listen, (process,)), (self._write, (process, self._lines))):
                threading.Thread(target=work, args=given, daemon=True).start()
        except (OSError, RuntimeError) as error:  # too many processes, or threads
            self._process = None
            if process is not None:
                process.kill()
                process.wait()
            logger.warning("The process that tells MLflow of models did not start: %s", error)

    def _write(self, process: subprocess.Popen[str], lines: _Lines) -> None:
        """Pass lines on; a process that does not read must not hold training up."""
        pipe = process.stdin
        assert pipe is not None  # nosec # noqa: S101 - a pipe was asked for
        # Who listens sees that the process is gone, and begins anew.
        with suppress(OSError, ValueError):
            while (line := lines.get()) is not None:
                pipe.write(json.dumps(line) + "\n")
                pipe.flush()
        with suppress(OSError):
            pipe.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # nosec # noqa: S101 - a pipe was asked for
        with process.stdout as pipe:
            for line in pipe:
                if line.endswith("\n"):  # the last one of a process that was killed may be half
                    self._answered(json.loads(line))
        process.wait()
        event("courier.ended", courier=process.pid, code=process.returncode)
        with self._changed:
            # Nobody ends one that is started after the end, or a second one.
            if self._closed or self._process is not process:
                return
            self._ask_last()
            lost = list(self._entries)
            self._lines.put(None)  # ends the thread that writes to it
            self._lines = queue.SimpleQueue()
            if self._starts < MAX_STARTS:
                self._start()
            else:
                self._process = None
        for path in lost:
            self._ask(path)

    def _ask_last(self) -> None:
        """Put what the process was at when it died behind the others: it may have died of it."""
        at_work = next((path for path, each in self._entries.items() if not each.asked), None)
        if at_work is not None:
            self._entries[at_work] = self._entries.pop(at_work)

    def _answered(self, message: dict[str, Any]) -> None:
        record = None
        with self._changed:
            path = Path(message.get("job", ""))
            entry = self._entries.get(path)
            if message.get("ended"):
                self._ended = True
            elif entry is not None:
                record = self._settle(path, entry, message)
        if record is not None and entry is not None:
            _tell(entry.told, TrackingRecord(**record))
        with self._changed:
            self._changed.notify_all()

    def _settle(self, path: Path, entry: _Entry, message: dict[str, Any]) -> dict[str, Any] | None:
        """Take an answer; return the record that it brings, if it is about the job that is noted.

        It says which job was asked about (``asked``), and which one was found (``token``; ``""``:
        none; without it: whichever is there).
        """
        ours = entry.job.token
        found = message.get("token", message["asked"])
        record: dict[str, Any] | None = message["record"]
        if found == ours:
            entry.asked = True
            if not message["left"]:
                self._starts = 0  # it works: only deaths in a row are too many
                del self._entries[path]
            return record
        if message["asked"] != ours:
            return None  # an older one was asked about; there will be another answer
        if found:
            entry.asked = True  # another process has noted something else, which is its own affair
            return None
        self._set_aside(path)  # damaged, gone with a disk, or done by a process that has died
        return record


def _tell(told: Told, record: TrackingRecord) -> None:
    """Pass on what a server holds; a report that cannot be written ends no thread of ours."""
    try:
        told(record)
    except Exception:
        logger.warning("What %s holds could not be written down.", record.uri, exc_info=True)


class Unavailable:
    """Stands for a server whose address could not be found out.

    Args:
        reason: Why; it goes to each report.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def submit(self, job: Job, told: Told) -> None:  # noqa: ARG002
        """Say that everything is missing."""
        told(TrackingRecord(uri="", missing=self._reason))

    def adopt(self, path: Path, told: Told) -> None:
        """Leave it."""

    def drain(self, limit_s: float, tell: Callable[[int], None]) -> None:
        """Do nothing."""

    def close(self, status: str) -> None:
        """Do nothing."""
