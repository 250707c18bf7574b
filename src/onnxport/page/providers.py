"""What each execution provider did: runs, and the nodes that it left to others."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from onnxport.page.parts import Cell, Section, Table
from onnxport.page.run import ratio_of
from onnxport.page.wording import NOTHING, clipped, duration_text, name_of, part_text

if TYPE_CHECKING:
    from onnxport.page.run import RunHistory
    from onnxport.report import Check, Placement

__all__ = ["providers"]

_MOST_OPERATORS = 12


def providers(run: RunHistory) -> Section:
    """Say what was run where."""
    checks: dict[str, list[Check]] = defaultdict(list)
    for report in run.reports:
        for check in report.checks:
            checks[check.provider].append(check)
    placed = run.with_most("placements")
    placements = {each.provider: each for each in placed.placements} if placed else {}
    names = list(dict.fromkeys([*checks, *placements]))
    if not names:
        return Section(
            name="providers",
            title="Execution providers",
            missing="No model was run: see the failures for the reason.",
        )
    of = (
        f"ONNX Runtime was asked where it runs the nodes of {name_of(placed)}."
        if placed
        else "Where the nodes run was not asked: the report of a graph's first model has it."
    )
    tables = [_table({name: (checks.get(name, []), placements.get(name)) for name in names[:20]})]
    if any(each.elsewhere for each in placements.values()):
        tables.append(_elsewhere(placements))
    return Section(name="providers", title="Execution providers", lead=of, tables=tuple(tables))


def _table(found: dict[str, tuple[list[Check], Placement | None]]) -> Table:
    return Table(
        caption="Runs of each execution provider, over all checkpoints",
        columns=(
            "provider",
            "runs",
            "agreed",
            "largest part of a budget",
            "time of all",
            "nodes there",
            "nodes elsewhere",
        ),
        rows=tuple(_row(name, checks, placed) for name, (checks, placed) in found.items()),
    )


def _row(name: str, checks: list[Check], placed: Placement | None) -> tuple[Cell | str, ...]:
    ratios = [ratio_of(output) for check in checks for output in check.outputs]
    agreed = sum(check.ok for check in checks)
    own = sum(placed.nodes.get(placed.provider, {}).values()) if placed else None
    other = sum(placed.elsewhere.values()) if placed else None
    return (
        clipped(name, 60),
        f"{len(checks):,}",
        Cell(f"{agreed:,}", "ok" if agreed == len(checks) else "bad") if checks else NOTHING,
        part_text(max(ratios, default=None)),
        duration_text(sum(check.seconds for check in checks)) if checks else NOTHING,
        NOTHING if own is None else f"{own:,}",
        NOTHING if other is None else Cell(f"{other:,}", "bad" if other else "ok"),
    )


def _elsewhere(placements: dict[str, Placement]) -> Table:
    """List the operators that a provider left to others, most nodes first."""
    rows = []
    for name, placed in placements.items():
        others = sorted(placed.elsewhere.items(), key=lambda each: -each[1])
        for operator, count in others[:_MOST_OPERATORS]:
            where = [
                provider
                for provider, operators in placed.nodes.items()
                if provider != name and operator in operators
            ]
            rows.append(
                (
                    clipped(operator, 80),
                    clipped(name, 60),
                    f"{count:,}",
                    clipped(", ".join(where), 120),
                )
            )
    return Table(
        caption="Operators that a provider left to others: each is a copy there and back",
        columns=("operator", "asked for", "nodes", "run by"),
        rows=tuple(rows),
        words=frozenset({1, 3}),
    )
