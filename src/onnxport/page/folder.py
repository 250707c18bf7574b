"""A run as its folder shows it: the history, the reports beside models, and the models."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport._files import OWED, hidden_below, read_small
from onnxport.errors import ConfigurationError
from onnxport.page.history import HISTORY, Event, latest, read, report_of
from onnxport.page.run import RunHistory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from onnxport.report import ExportReport

__all__ = ["history_of"]

REPORT = ".onnx.json"
_MOST_REPORTS = 20_000


def history_of(folder: Path) -> RunHistory:
    """Find what became of a run's checkpoints, in a folder and below.

    If there are histories of several runs, the newest one counts, with the reports that lie beside
    no other.

    Args:
        folder: Where; nothing outside of it is read, whatever a report says.

    Raises:
        ConfigurationError: If there are no reports.
        OSError: If a history cannot be read.
    """
    histories, files = _found(folder)
    chosen = histories[0] if histories else None
    events, unreadable = read(chosen) if chosen else ((), 0)
    elsewhere = tuple(each.parent for each in histories[1:])
    beside = [each for each in files if not _is_of(each, elsewhere, chosen)]
    reports = [_report_in(file) for file in beside]
    merged = _merged(events, filter(None, reports))
    owed = sum(1 for _ in hidden_below(folder, OWED))
    if not merged and owed:
        raise ConfigurationError(
            f"No model is made yet in {str(folder)!r}; {owed} are owed, and `onnxport resume` "
            "makes them."
        )
    if not merged:
        raise ConfigurationError(
            f"No reports of onnxport were found in {str(folder)!r}. Give the folder of a run: of "
            f"its {HISTORY}, or of its models and their *{REPORT}."
        )
    run = RunHistory(
        events=merged,
        name=folder.resolve().name,
        unreadable=unreadable + reports.count(None),
        owed=owed,
        others=tuple(str(each.relative_to(folder)) for each in histories[1:]),
    )
    return _with_models(run, folder, beside)


def _found(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the histories, newest first, and the reports in a folder and below."""
    histories: list[tuple[float, Path]] = []
    reports: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if path.is_symlink():
                continue
            if name == HISTORY:
                histories.append((path.stat().st_mtime, path))
            elif name.endswith(REPORT) and len(reports) < _MOST_REPORTS:
                reports.append(path)
    return [path for _, path in sorted(histories, reverse=True)], reports


def _is_of(file: Path, elsewhere: tuple[Path, ...], chosen: Path | None) -> bool:
    """Tell whether a report lies nearer to another run's history than to the chosen one."""
    depth = len(chosen.parent.parts) if chosen and file.is_relative_to(chosen.parent) else -1
    return any(file.is_relative_to(each) and len(each.parts) > depth for each in elsewhere)


def _report_in(file: Path) -> Event | None:
    try:
        report = report_of(json.loads(read_small(file)))
        when = file.stat().st_mtime
    except (OSError, ValueError, RecursionError):
        return None
    return None if report is None else Event(report=report, time=when)


def _merged(events: Iterable[Event], beside: Iterable[Event]) -> tuple[Event, ...]:
    """Put together a history and the reports beside models, in the order of training.

    The history knows more (how long training was held up), and less where a server was told by
    another command since. Its own order is that of the reports: a model that was owed comes late.
    """
    known = {event.key: event for event in latest(events)}
    for event in beside:
        ours = known.get(event.key, event)
        tracking = ours.report.tracking or event.report.tracking
        known[event.key] = replace(ours, report=replace(ours.report, tracking=tracking))
    return tuple(sorted(latest(known.values()), key=_when))


def _when(event: Event) -> tuple[float, float]:
    step = event.report.global_step
    return (math.inf if step is None else step, event.time or 0.0)


def _with_models(run: RunHistory, folder: Path, beside: list[Path]) -> RunHistory:
    """Look which models are there; of the one that is shown, or else of the last, the graph is."""
    named = {each.name.removesuffix(".json"): each.with_suffix("") for each in beside}
    places = {report.path: _place(report, folder, named) for report in run.proven}
    there = {path: place for path, place in places.items() if path and place}
    sizes = {path: sum(_sizes(place)) for path, place in there.items()}
    wanted = (run.shown, *reversed(run.proven))
    shown = next((there[one.path] for one in wanted if one and one.path in there), None)
    return replace(run, files=sizes, model=shown)


def _place(report: ExportReport, folder: Path, named: dict[str, Path]) -> Path | None:
    """Return where a model lies, if that is in the folder; the folder may have been moved."""
    said = Path(report.path or "")
    for place in (said, named.get(said.name)):
        try:
            if place and place.is_file() and place.resolve().is_relative_to(folder.resolve()):
                return place
        except (OSError, ValueError):  # no path that a system takes
            continue
    return None


def _sizes(model: Path) -> Iterator[int]:
    for file in (model, model.with_name(f"{model.name}.data")):
        try:
            yield file.stat().st_size
        except OSError:
            continue
