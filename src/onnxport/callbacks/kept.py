"""The reports of a run, in the order of the checkpoints; told to the user, and kept to raise."""

from __future__ import annotations

import logging
import threading
from bisect import bisect
from dataclasses import fields, is_dataclass, replace
from operator import is_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport._events import event
from onnxport.errors import ExportError, TrackingError
from onnxport.report import TO_REPEAT, known_as

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from onnxport.report import ExportReport, TrackingRecord

__all__ = ["KeptReports"]

logger = logging.getLogger(__name__)


class KeptReports:
    """Keeps and tells what became of each checkpoint; models may be finished in any order.

    Args:
        say: Tells the user one line per model.
        note: Called with each report, and again when a server was told, with its place.

    Attributes:
        reports: In the order in which the checkpoints were begun.
        last: The one that was finished last.
        over: Training is over, or ends now.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        note: Callable[[ExportReport, int], None] = lambda _, __: None,
    ) -> None:
        self._note = note
        self.reports: list[ExportReport] = []
        self.last: ExportReport | None = None
        self.over = False
        self._say = say
        self._lock = threading.RLock()  # a signal's handler may save while it is held
        self._places: list[int] = []
        self._begun = 0
        self._failure: ExportError | None = None
        self._told: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._is_down = False

    def next_place(self) -> int:
        """Return the place of a checkpoint that is begun now."""
        self._begun += 1
        return self._begun

    def keep(
        self,
        report: ExportReport,
        seconds: Mapping[str, float],
        place: int,
    ) -> None:
        """Keep a report at its place, and tell the user.

        Args:
            report: The report.
            seconds: Durations to add to those in it.
            place: As :meth:`next_place` gave it.
        """
        times = report.seconds | {name: round(value, 4) for name, value in seconds.items()}
        report = replace(report, seconds=times)
        with self._lock:
            if self.reports:  # a long run has thousands of them
                report = _shared(report, self.reports[-1])
            index = bisect(self._places, place)
            self._places.insert(index, place)
            self.reports.insert(index, report)
            self.last = report
        self._note(report, place)
        _log(report)
        if report.ok:
            self._say(_success_line(report))
            self._tell(report)
            return
        name = known_as(report.checkpoint) if report.checkpoint else "the final weights"
        code = "" if report.code is None else f" [{report.code}]"
        message = f"No ONNX model for {name}{code}: {report.error}"
        if self._failure is None:
            self._failure = ExportError(message, report)
        # A reason may be long, and the same for each checkpoint.
        reason = _reason(report)
        first = self._reasons.get(reason)
        self._reasons.setdefault(reason, name)
        like = "as before" if first == name else f"as for {first}"
        text = message if first is None else f"No ONNX model for {name}, {like}."
        text = text if text.endswith((".", "!", "?")) else f"{text}."
        logger.warning("%s", text if self.over else f"{text} Training goes on.")

    def tried(self, report: ExportReport) -> None:
        """Remember why the trial before the first checkpoint has failed: it was said at length.

        Args:
            report: Of the trial.
        """
        self._reasons.setdefault(_reason(report), "the trial")

    def update(self, place: int, record: TrackingRecord) -> ExportReport | None:
        """Add what a tracking server holds to a report; return the report.

        Args:
            place: As :meth:`next_place` gave it.
            record: What the server holds, or what is missing.
        """
        with self._lock:
            index = bisect(self._places, place) - 1
            if index < 0 or self._places[index] != place:
                return None
            if self.reports[index].tracking == record:  # it is tried again and again
                return self.reports[index]
            report = self.reports[index] = self.reports[index].with_tracking(record)
        self._note(report, place)
        told = "server.missing" if record.missing else "server.told"
        event(
            told,
            model=report.path,
            uri=record.uri,
            logged_model=record.model_id,
            version=record.version,
            alias=record.alias,
            missing=record.missing or None,
        )
        if record.missing:
            # A server that is down for days would fill the log with one and the same line.
            level = logging.DEBUG if self._is_down else logging.WARNING
            code = TrackingError.code
            logger.log(level, "Tracking %s [%s]: %s", report.path, code, record.missing)
        elif record.alias is not None:
            self._say(
                f"onnxport: version {record.version} of {record.registered_name!r} "
                f"({known_as(str(report.path))}) is {record.alias} now"
            )
        self._is_down = bool(record.missing)
        return report

    def take_failure(self) -> ExportError | None:
        """Return the first failure that was not taken yet."""
        failure, self._failure = self._failure, None
        return failure

    def _tell(self, report: ExportReport) -> None:
        """Log what the proof could not show, once per run."""
        for warning in report.warnings:
            if warning not in self._told:
                self._told.add(warning)
                logger.warning("%s: %s", Path(report.path or "dry run").name, warning)


def _shared(now: Any, last: Any) -> Any:
    """Return the same value, with the objects of another one wherever the two are the same."""
    if type(now) is not type(last):
        return now
    if is_dataclass(now) and not isinstance(now, type):
        names = [each.name for each in fields(now)]
        parts = {name: _shared(getattr(now, name), getattr(last, name)) for name in names}
        same = all(part is getattr(last, name) for name, part in parts.items())
        return last if same else replace(now, **parts)
    if isinstance(now, dict) and list(now) == list(last):
        values = {name: _shared(value, last[name]) for name, value in now.items()}
        same = all(value is last[name] for name, value in values.items())
        return last if same else dict(zip(last, values.values(), strict=True))
    if isinstance(now, tuple) and len(now) == len(last):
        items = tuple(map(_shared, now, last))
        return last if all(map(is_, items, last)) else items
    # Not by equality alone: 0.0 is equal to -0.0, and neither is what the other report says.
    return last if repr(now) == repr(last) else now


def _log(report: ExportReport) -> None:
    facts = {"checkpoint": report.checkpoint, "step": report.global_step}
    seconds = report.seconds.get("total")
    if not report.ok:
        event("model.failed", **facts, code=report.code, seconds=seconds, error=report.error)
        return
    event(
        "model.proven",
        model=report.path,
        **facts,
        core=report.core,
        how=report.how,
        weights=report.weights_sha256,
        max_error=report.max_abs_error,
        seconds=seconds,
    )


def _success_line(report: ExportReport) -> str:
    dims = sorted({dim for axes in report.dynamic_axes.values() for dim in axes.values()})
    target = f", target {report.target!r}" if report.target else ""
    how = f"{report.core}, refreshed" if report.how == "refresh" else report.core
    return (
        f"onnxport: {report.path or 'dry run'} proven ({how}{target}, dynamic: "
        f"{', '.join(dims) or 'nothing'}, max error {report.max_abs_error:.1e}, "
        f"{report.seconds.get('total', 0.0):.1f} s)"
    )


def _reason(report: ExportReport) -> str:
    """Return why there is no model, without where that can be repeated."""
    return str(report.error).partition(TO_REPEAT)[0]
