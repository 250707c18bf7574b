"""Carries out what is noted in jobs, one at a time, in whichever process."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import TYPE_CHECKING

from onnxport._files import MOST_BYTES
from onnxport.errors import OnnxportError, TrackingError
from onnxport.report import TrackingRecord
from onnxport.tracking.base import ModelChangedError, without_password
from onnxport.tracking.job import finish_job, read_job

if TYPE_CHECKING:
    import io
    from collections.abc import Callable
    from pathlib import Path

    from onnxport.tracking.base import RunAddress, Tracker
    from onnxport.tracking.job import Job

__all__ = ["Carried", "Courier", "hasty_tracker", "patient_tracker", "with_password"]

logger = logging.getLogger(__name__)

_OF_THE_SERVER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""Codes of MLflow's errors; those of its transport have the first one."""
_OF_A_MODEL = ("onnx.", "google.protobuf.")
"""Modules of errors that say something of one model."""
_WHAT = "the logged model, its metrics and its version"


def hasty_tracker(address: RunAddress) -> Tracker:
    """Return the tracker of a run in MLflow for a process that trains meanwhile."""
    from onnxport.tracking.mlflow import HASTY, MlflowTracker

    return MlflowTracker(address, HASTY)


def patient_tracker(address: RunAddress) -> Tracker:
    """Return the tracker of a run in MLflow for a process that has nothing else to do."""
    from onnxport.tracking.mlflow import PATIENT, MlflowTracker

    return MlflowTracker(address, PATIENT)


@dataclass(frozen=True, slots=True)
class Carried:
    """What came of a job.

    Args:
        token: Of the job; ``""``: there was none, or (where it is left) it cannot be read now, or
            another process has it.
        record: What the server holds now, with ``missing`` if it could not be done; ``None`` for a
            model that was removed.
        left: Whether it is still to be done.
        down: Whether the server is, so that other jobs would fail like it.
        damaged: Whether the job could not be understood, and was removed: whoever knows it may note
            it anew.
    """

    token: str = ""
    record: TrackingRecord | None = None
    left: bool = False
    down: bool = False
    damaged: bool = False


class Courier:
    """Brings what jobs ask for to their servers.

    Args:
        tracker_of: Makes the tracker of a run.
    """

    def __init__(self, tracker_of: Callable[[RunAddress], Tracker] = patient_tracker) -> None:
        self._tracker_of = tracker_of
        self._trackers: dict[RunAddress, Tracker] = {}

    def carry_out(self, path: Path, uri: str | None = None) -> Carried:
        """Carry out a job; what was done is no job any more.

        Args:
            path: The job.
            uri: The address of its server with the password, if it has one; ``None``: see
                :func:`with_password`.
        """
        try:
            return self._carry_out(path, uri)
        except OSError as error:  # of the disk of the job, now; what was done is found done
            logger.debug("%s cannot be read or removed", path, exc_info=True)
            text = f"fails: {error.strerror or error}"
            return Carried("", _failed_note(uri, text), left=True)

    def _carry_out(self, path: Path, uri: str | None) -> Carried:
        try:
            file = _locked(path)
        except BlockingIOError:  # another process is at it, and may die of it
            return Carried(left=True)
        except (FileNotFoundError, NotADirectoryError):
            return Carried()
        with file:
            seen = os.fstat(file.fileno())
            try:
                job = read_job(path, file.read(MOST_BYTES))
            except ValueError as error:
                logger.warning("%s is damaged (%s): it is removed.", path, error)
                finish_job(path, seen)
                return Carried("", _failed_note(uri, f"is damaged ({error})"), damaged=True)
            address = replace(job.address, uri=uri or with_password(job.address.uri))
            begun = TrackingRecord(uri=without_password(address.uri))
            try:
                record = self._do(job, address)
            except ModelChangedError as error:  # what is there now has a job of its own
                record = replace(begun, missing=str(error))
            except Exception as error:  # MLflow, its store and its transport raise anything
                logger.debug("%s could not be carried out", path, exc_info=True)
                text = f"{_WHAT} are missing from {begun.uri}: {_first_line(error)}"
                record = replace(begun, missing=text)
                return Carried(job.token, record, left=True, down=_is_down(error))
            finish_job(path, seen)
            return Carried(job.token, record)

    def _do(self, job: Job, address: RunAddress) -> TrackingRecord | None:
        tracker = self._tracker(address)
        record = None
        if job.attached:
            tracker.attach(job.model)
        elif job.content is None:
            tracker.remove(job.place)
        else:
            record = tracker.publish(job.content, last=job.last)
        if job.ended is not None:
            tracker.close(job.ended)
        return record

    def close(self, address: RunAddress, status: str) -> None:
        """End a run of our own, if it can be done now.

        Args:
            address: The run.
            status: ``"FINISHED"`` or ``"FAILED"``.
        """
        try:
            self._tracker(address).close(status)
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("The run was not ended: %s", _first_line(error))

    def _tracker(self, address: RunAddress) -> Tracker:
        if address not in self._trackers:
            self._trackers[address] = self._tracker_of(address)
        return self._trackers[address]


def _failed_note(uri: str | None, how: str) -> TrackingRecord:
    server = without_password(uri or "")
    return TrackingRecord(uri=server, missing=f"the note of what the server should hold {how}")


def with_password(uri: str) -> str:
    """Return an address with the password that ``MLFLOW_TRACKING_URI`` has for it, if it does."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if known and without_password(known) == uri else uri


def _locked(path: Path) -> io.BufferedReader:
    """Open a job for this process alone.

    Where the system has no such locks (Windows), two processes may do the same work; each step of
    it looks before it creates.

    Raises:
        BlockingIOError: If another process has it.
        OSError: If it is gone, or the disk does not let it be read.
    """
    file = path.open("rb")
    try:
        import fcntl
    except ImportError:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # some network disks have no locks either
        logger.debug("%s is not locked", path, exc_info=True)
    return file


def _is_down(error: Exception) -> bool:
    """Tell an error of the server, or of the way there, from one of a single model.

    MLflow's own errors have a code. A file that cannot be read, or is no model, is no reason to let
    others wait. All else is of the way: what a transport raises, or what comes of an answer that is
    none (a ``KeyError``).
    """
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _OF_THE_SERVER
    if isinstance(error, (TrackingError, ConnectionError, TimeoutError)):
        return True
    of_a_file = type(error).__module__ == "builtins" and isinstance(error, (OSError, ValueError))
    ours = isinstance(error, OnnxportError)
    return not (of_a_file or ours or type(error).__module__.startswith(_OF_A_MODEL))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 300, placeholder=" ...") if lines else type(error).__name__
