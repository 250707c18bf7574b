"""A run as a value: its events in order, and which of its models a page is about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnxport.page.history import Event
    from onnxport.report import ExportReport, OutputError, Variant

__all__ = ["RunHistory", "ratio_of", "worst_ratio"]


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """All that is known of a run.

    Args:
        events: One for each checkpoint, in the order of training.
        name: What people call it: its folder, say.
        files: Path in a report -> size of the model's files, for the models that are still there;
            ``None``: nobody has looked.
        model: The file whose graph is shown, or ``None``.
        unreadable: So many lines of the history, and files, are no reports.
        owed: So many models are noted as still to be made.
        others: Histories of other runs below the same folder.
    """

    events: tuple[Event, ...] = ()
    name: str = ""
    files: Mapping[str, int] | None = field(default=None, hash=False)
    model: Path | None = None
    unreadable: int = 0
    owed: int = 0
    others: tuple[str, ...] = ()

    @cached_property
    def reports(self) -> tuple[ExportReport, ...]:
        """Of each checkpoint, in order."""
        return tuple(event.report for event in self.events)

    @cached_property
    def proven(self) -> tuple[ExportReport, ...]:
        """Of the checkpoints that have a model."""
        return tuple(report for report in self.reports if report.ok)

    @cached_property
    def failed(self) -> tuple[ExportReport, ...]:
        """Of the checkpoints that have none."""
        return tuple(report for report in self.reports if not report.ok)

    @cached_property
    def monitor(self) -> tuple[str, Literal["min", "max"]] | None:
        """The metric that decides which checkpoint is best, and how."""
        named = (
            (one.monitor, one.mode)
            for event in reversed(self.events)
            for one in (event, event.report)  # the event of a checkpoint of long ago says nothing
        )
        return next(((name, mode) for name, mode in named if name), None)

    @cached_property
    def champion(self) -> ExportReport | None:
        """The version that was the last one to get an alias in the registry."""
        with_alias = (each for each in self.proven if each.tracking and each.tracking.alias)
        return max(with_alias, key=_version, default=None)

    @cached_property
    def best(self) -> ExportReport | None:
        """The one with the best watched metric, proven; ``None`` if no metric is watched."""
        if self.monitor is None:
            return None
        name, mode = self.monitor
        scored = [each for each in self.proven if math.isfinite(each.metrics.get(name, math.nan))]
        pick = max if mode == "max" else min
        return pick(scored, key=lambda each: each.metrics[name], default=None)

    @cached_property
    def shown(self) -> ExportReport | None:
        """The model that sections on one model are about: champion, best, or else the last."""
        last = self.proven[-1] if self.proven else None
        return self.champion or self.best or last

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, the watched one first, then validation's."""
        names = dict.fromkeys(name for report in self.reports for name in report.metrics)
        first = self.monitor[0] if self.monitor else ""
        return tuple(sorted(names, key=lambda name: (name != first, "val" not in name.lower())))

    def with_most(self, *names: str) -> ExportReport | None:
        """Return the shown report if it has what is asked for, or else the last one that has.

        Args:
            names: Of fields of a report, any of which is enough.
        """
        candidates = (self.shown, *reversed(self.reports))
        return next(
            (one for one in candidates if one and any(getattr(one, name) for name in names)), None
        )

    def role_of(self, report: ExportReport) -> str:
        """Say what a checkpoint is among the others, in a word or two, or ``""``."""
        roles = [
            (report is self.champion, str(report.tracking and report.tracking.alias)),
            (report is self.best, "best"),
        ]
        return ", ".join(name for holds, name in roles if holds)

    def size_of(self, report: ExportReport) -> int | None:
        """Return how many bytes a model has, as far as anybody knows."""
        if report.bytes is None and self.files is not None and report.path is not None:
            return self.files.get(report.path)
        return report.bytes

    def is_kept(self, report: ExportReport) -> bool | None:
        """Tell whether a model is still where it was made; ``None``: nobody has looked."""
        return None if self.files is None else report.path in self.files

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the page's head as plain values for JSON."""
        ratios = [ratio for each in self.proven if (ratio := worst_ratio(each)) is not None]
        return {
            "checkpoints": len(self.reports),
            "proven": len(self.proven),
            "failed": len(self.failed),
            "checks": sum(len(report.checks) for report in self.reports),
            "largest_part_of_budget": max(ratios, default=None),
            "monitor": self.monitor and self.monitor[0],
            "best": self.best and self.best.path,
            "champion": self.champion and self.champion.path,
            "unreadable": self.unreadable,
            "owed": self.owed,
            "other_runs": list(self.others),
        }


def worst_ratio(report: ExportReport | Variant) -> float | None:
    """Return the largest part of its budget that any output uses in any check of a model."""
    ratios = (ratio_of(output) for check in report.checks for output in check.outputs)
    return max(ratios, default=None)


def ratio_of(output: OutputError) -> float:
    """Return which part of its budget an output uses; infinity where there is none to use."""
    error, budget = output.max_abs_error, output.budget
    if error == 0:
        return 0.0
    if not math.isfinite(error) or not budget > 0:
        return math.inf
    return error / budget


def _version(report: ExportReport) -> int:
    return (report.tracking and report.tracking.version) or 0
