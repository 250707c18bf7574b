"""What went wrong and what to know: failures with their way out, warnings, and what was tried."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from onnxport.page.parts import Cell, Note, Section, Table
from onnxport.page.wording import clipped, counted, duration_text, name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnxport.page.run import RunHistory
    from onnxport.report import Attempt, ExportReport

__all__ = ["attempts", "failures", "warnings"]

ADVICE = {
    "OX100": "Correct the argument; help(OnnxExport) has every option and its default.",
    "OX110": "Install what the message names: pip install 'onnxport[all]' has everything.",
    "OX120": "Keep a model and its .data file together, as they were written.",
    "OX200": "Give OnnxExport(inputs=Inputs(example=...)), set example_input_array in the module, "
    'or name what is called with target="...".',
    "OX300": "Read the reasons below from the first on: each names the operator or the statement, "
    'and the line of your own code. preflight="raise" ends training in the first minute instead.',
    "OX400": "Look at the run that failed: its sizes, its provider, its rows. "
    "Verify(tolerance=Tolerance(...)) widens the budget, if you know why.",
    "OX410": "`onnxport doctor` shows which providers run. Too little memory: "
    "Verify(gpu_memory_mb=). A provider that you do not serve with can be left out.",
    "OX500": "Free space, or give another folder with dirpath=. The next fit makes the model, or "
    "onnxport resume FOLDER.",
    "OX600": "Background(memory_gb=, stage_timeout_s=, drain_s=) say how much the worker may use. "
    "The next fit makes the model, or onnxport resume FOLDER.",
    "OX700": "Once the server is well: onnxport sync FOLDER, or the next fit.",
    "OX900": "If your code is in the traceback, it was run in eval mode with the checkpoint's "
    "weights. If not, please report it with the log.",
}
"""Code of an error -> the way out, in a sentence or two; docs/errors has a page for each."""
_MOST_NOTES, _MOST_NAMES, _MOST_ATTEMPTS = 50, 6, 30


def failures(run: RunHistory) -> Section:
    """Say why checkpoints have no model, and what to do."""
    groups: dict[tuple[str, str], list[ExportReport]] = defaultdict(list)
    for report in reversed(run.failed):
        groups[report.code or "OX900", report.error or "No reason was given."].append(report)
    untold = [r for r in run.proven if r.tracking and r.tracking.missing]
    if not groups and not untold:
        missing = "none: every checkpoint has a proven model."
        return Section(name="failures", title="Failures", missing=missing)
    notes = [
        Note(
            title=f"{code} at {counted(len(reports), 'checkpoint')}",
            text=clipped(error),
            advice=ADVICE.get(code, ""),
            where=_where(reports),
            attempts=_attempts(reports[0].attempts, "What was tried")
            if reports[0].attempts
            else None,
            mark="bad",
        )
        for (code, error), reports in list(groups.items())[:_MOST_NOTES]
    ]
    lead = f"{counted(len(run.failed), 'checkpoint')} without a model." if groups else ""
    return Section(name="failures", title="Failures", lead=lead, notes=(*notes, *_not_told(untold)))


def _not_told(untold: Sequence[ExportReport]) -> tuple[Note, ...]:
    if not untold:
        return ()
    text = untold[-1].tracking and untold[-1].tracking.missing
    return (
        Note(
            title=f"OX700 at {counted(len(untold), 'checkpoint')}: proven, and not told",
            text=clipped(str(text)),
            advice=ADVICE["OX700"],
            where=_where(untold),
            mark="bad",
        ),
    )


def _where(reports: Sequence[ExportReport]) -> str:
    names = [name_of(report) for report in reports[:_MOST_NAMES]]
    more = len(reports) - len(names)
    return ", ".join(names) + (f", and {more:,} more" if more > 0 else "")


def warnings(run: RunHistory) -> Section:
    """Show each warning once."""
    groups: dict[str, list[ExportReport]] = defaultdict(list)
    for report in run.reports:
        for text in report.warnings:
            groups[text].append(report)
    if not groups:
        return Section(name="warnings", title="Warnings", missing="none.")
    notes = [
        Note(
            title=f"At {counted(len(found), 'checkpoint')}", text=clipped(text), where=_where(found)
        )
        for text, found in list(groups.items())[:_MOST_NOTES]
    ]
    return Section(name="warnings", title="Warnings", notes=tuple(notes))


def attempts(run: RunHistory) -> Section:
    """Say for each core how often it won, and why it lost."""
    found: dict[tuple[str, str, bool, str], list[Attempt]] = defaultdict(list)
    for each in (attempt for report in run.reports for attempt in report.attempts):
        found[each.core, each.variant, each.ok, each.reason].append(each)
    if not found:
        return Section(name="attempts", title="Cores", missing="No core was tried.")
    first = next((each for each in run.reports if each.how == "export" and each.attempts), None)
    lead = "How often each core was tried, over all checkpoints, and why it lost."
    if first is not None and first.ok:
        lead += f" The graph is of {name_of(first)}, by {first.core}."
    order = sorted(found.items(), key=lambda each: (not each[0][2], -len(each[1])))
    rows = tuple(
        (_core(core, variant), _verdict(ok=ok), f"{len(each):,}", _mean(each), clipped(reason))
        for (core, variant, ok, reason), each in order[:200]
    )
    columns = ("core", "verdict", "times", "mean time", "why it lost")
    table = Table(caption="What was tried", columns=columns, rows=rows, words=frozenset({1, 4}))
    return Section(name="attempts", title="Cores", lead=lead, tables=(table,))


def _attempts(tried: Sequence[Attempt], caption: str) -> Table:
    return Table(
        caption=caption,
        columns=("core", "verdict", "time", "why it lost"),
        rows=tuple(
            (
                _core(each.core, each.variant),
                _verdict(ok=each.ok),
                duration_text(each.seconds),
                clipped(each.reason),
            )
            for each in tried[:_MOST_ATTEMPTS]
        ),
        words=frozenset({1, 3}),
    )


def _core(core: str, variant: str) -> str:
    return clipped(f"{core}, {variant}" if variant else core, 80)


def _verdict(*, ok: bool) -> Cell:
    return Cell("won", "ok") if ok else Cell("lost", "bad")


def _mean(tried: Iterable[Attempt]) -> str:
    seconds = [each.seconds for each in tried]
    return duration_text(sum(seconds) / len(seconds))
