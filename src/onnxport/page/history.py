"""What became of each checkpoint of a run, one line after the other in a file that only grows.

Each line of ``onnxport.jsonl`` is one event: ``{"report": ..., "time": 1767225600.0}``, the report
as its own JSON and seconds since 1970, and ``"monitor"`` and ``"mode"`` where one metric decides.
A later line of the same checkpoint takes the place of an earlier one: a tracking server is told
later. Training imports this module: nothing heavy may be imported here.
"""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from onnxport.page.conform import conforms
from onnxport.report import ExportReport

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["HISTORY", "Event", "append", "latest", "read", "report_of"]

HISTORY = "onnxport.jsonl"
"""Name of the file."""
_MOST_BYTES = 1 << 28
"""So much of the end of a file is read, some ten thousand events."""
_MOST_OF_A_LINE = 1 << 23
_KINDS: dict[str, Any] = {"time": float, "monitor": str, "mode": Literal["min", "max"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What was known of one checkpoint at one time.

    Args:
        report: What became of it.
        time: When, in seconds since 1970, or ``None``.
        monitor: Name of the metric that decides which checkpoint is best, or ``None``.
        mode: ``"min"`` or ``"max"`` for that metric.
    """

    report: ExportReport
    time: float | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"

    @property
    def key(self) -> tuple[object, ...]:
        """What it has in common with later events of the same checkpoint."""
        report = self.report
        weights = (report.global_step, report.weights_sha256)
        return (report.path or report.checkpoint, report.target, *weights)


def append(
    path: Path,
    report: ExportReport,
    *,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
) -> None:
    """Add an event to a history; the file is made if it is not there.

    One write, so that processes may share a file. What an earlier one left in the middle of a
    line, on a full disk for instance, stays a line of its own.

    Args:
        path: The history.
        report: What became of a checkpoint.
        monitor: Name of the metric that decides which checkpoint is best, or ``None``.
        mode: ``"min"`` or ``"max"`` for that metric.

    Raises:
        OSError: If the disk does not take it, or it is no file of its own.
    """
    data = {"report": json.loads(report.to_json()), "time": round(time.time(), 3)}
    if monitor is not None:
        data |= {"monitor": monitor, "mode": mode}
    line = json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no file")
        if found.st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: the disk took only a part of a line")
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[tuple[Event, ...], int]:
    """Read a history of anybody's.

    Args:
        path: The file.

    Returns:
        Its events in order, and how many lines are none. Of a very large file, the end is read.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST_BYTES))
        lines = file.read(_MOST_BYTES).split(b"\n")
    torn = lines.pop()
    if size > _MOST_BYTES:
        lines = lines[1:]
    found = [_event(line) for line in lines if line.strip()]
    last = _event(torn)  # whole, if somebody's editor has taken the end of its line
    events = tuple(event for event in (*found, last) if event is not None)
    return events, found.count(None)


def latest(events: Iterable[Event]) -> tuple[Event, ...]:
    """Leave out what later events replace: the same checkpoint, or a failure that was made good."""
    found: dict[tuple[object, ...], Event] = {}
    for event in events:
        found[event.key] = event
    made = {_source(event) for event in found.values() if event.report.ok}
    return tuple(each for each in found.values() if each.report.ok or _source(each) not in made)


def report_of(data: Any) -> ExportReport | None:
    """Read the JSON of a report that anybody may have written; ``None`` if it is none."""
    try:
        report = ExportReport.from_dict(data)
        return report if conforms(report, ExportReport) else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _source(event: Event) -> tuple[object, ...]:
    report = event.report
    if report.checkpoint is None:
        return (id(event),)  # nothing says that two of them are of one checkpoint
    return (report.checkpoint, report.target, report.global_step)


def _event(line: bytes) -> Event | None:
    if len(line) > _MOST_OF_A_LINE:
        return None
    try:
        data: Any = json.loads(line)
        report = report_of(data["report"])
        rest = {key: data[key] for key in _KINDS if data.get(key) is not None}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if report is None or not all(conforms(value, _KINDS[key]) for key, value in rest.items()):
        return None
    return Event(report=report, **rest)
