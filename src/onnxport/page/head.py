"""The head of the page: a run in four numbers."""

from __future__ import annotations

from onnxport.page.parts import Fact
from onnxport.page.run import RunHistory, worst_ratio
from onnxport.page.wording import (
    NOTHING,
    clipped,
    counted,
    duration_text,
    name_of,
    number_text,
    part_text,
)

__all__ = ["head"]


def head(run: RunHistory) -> tuple[Fact, ...]:
    """Say in a few numbers how a run went."""
    ratios = (worst_ratio(report) for report in run.proven)
    worst = max((ratio for ratio in ratios if ratio is not None), default=None)
    checks = sum(len(report.checks) for report in run.reports)
    totals = sorted(each.seconds["total"] for each in run.proven if "total" in each.seconds)
    stalls = [each.seconds["stall"] for each in run.reports if "stall" in each.seconds]
    facts = [
        Fact(
            name="Proven models",
            text=f"{len(run.proven):,} of {len(run.reports):,}",
            more=counted(len(run.failed), "failure") if run.failed else "no failure",
            mark="some" if run.failed else "ok",
        ),
        _leader(run),
        Fact(
            name="Largest error",
            text=part_text(worst),
            more=f"of its budget, in {counted(checks, 'run')} of ONNX Runtime",
        ),
    ]
    if totals:
        stalled = f"training was held up for {duration_text(sum(stalls))} in all"
        text = duration_text(totals[len(totals) // 2])
        facts.append(
            Fact(name="From checkpoint to model", text=text, more=stalled if stalls else "median")
        )
    return tuple(facts)


def _leader(run: RunHistory) -> Fact:
    shown = run.shown
    if shown is None:
        return Fact(name="Best model", text=NOTHING, more="no checkpoint has a model", mark="bad")
    name = clipped(name_of(shown), 40)
    if run.monitor and run.monitor[0] in shown.metrics:
        name = f"{run.monitor[0]} {number_text(shown.metrics[run.monitor[0]])}"
    if run.champion:
        of = shown.tracking and shown.tracking.registered_name
        version = shown.tracking and shown.tracking.version
        return Fact(name="Champion", text=name, more=f"version {version} of {of}", mark="best")
    if run.best:
        return Fact(name="Best model", text=name, more=name_of(shown), mark="best")
    return Fact(name="Last model", text=name, more="no metric is watched: the last one is shown")
