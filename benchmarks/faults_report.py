"""What the long form of the faults writes: tables, and their place in a page."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["put_into", "tables", "total_of"]

Row = dict[str, Any]
Found = dict[str, Any]

_BEGIN, _END = "<!-- made by make faults -->\n", "<!-- until here -->\n"
_OF_A_DISK = re.compile(r"(disk of models): (E[A-Z]+) (at .*)")
_ENDED = {
    "training process": "training ended by it",
    "training process: SIGSTOP, then SIGCONT": "training as without it",
    "user code: training_step raises": "training ended by it, as without the callback",
}


def tables(found: Found) -> str:
    """Return a table of areas, and one of the kinds of each area.

    Args:
        found: What ``faults.json`` holds.
    """
    areas: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for name, row in found["faults"].items():
        area, _, kind = _together(name).partition(": ")
        areas[area][kind].append(row)
    rows = found["faults"].values()
    made = f"{found['cpu']}, {found['cores']} cores; {max(row['date'] for row in rows)}"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [f"{total_of(found)} ({made}, {commits}.)", ""]
    lines += ["| area | kinds | times | broken promises | models missing at the end of training |"]
    lines += ["|---|---|---|---|---|"]
    for area, kinds in areas.items():
        every = [row for same in kinds.values() for row in same]
        total = _sum(every)
        cells = [area, len(every), total["fired"], total["problems"], total["failed"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "A model that is missing has a report or a note; the next start has made it,"]
    lines += ["unless the last column of these tables says what is lost."]
    for area, kinds in areas.items():
        lines += ["", f"<details><summary>{area}</summary>", ""]
        lines += ["| fault | times | what happened | what was lost |", "|---|---|---|---|"]
        lines += [_line(area, kind, same) for kind, same in kinds.items()]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def total_of(found: Found) -> str:
    """Return in words how much was tried."""
    total = _sum(found["faults"].values())
    return (
        f"{len(found['faults'])} kinds of fault, {total['fired']:,} injections, "
        f"{total['problems']} broken promises."
    )


def put_into(page: str, text: str) -> str:
    """Return a page with other tables at their place.

    Raises:
        ValueError: If it has no such place.
    """
    before, _, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError("the page has no place for tables")
    return f"{before}{_BEGIN}{text}{_END}{after}"


def _line(area: str, kind: str, rows: list[Row]) -> str:
    total = _sum(rows)
    name = f"{area}: {kind}"
    happened = _ENDED.get(name, _ENDED.get(area, "training as without it"))
    missing = f"{total['failed']} models missing at its end" if total["failed"] else "all models"
    broken = f"; **{total['problems']} broken promises**" if total["problems"] else ""
    lost = rows[0]["lost"] or "nothing"
    return f"| {kind} | {total['fired']} | {happened}; {missing}{broken} | {lost} |"


def _together(name: str) -> str:
    """Return what errors of a disk have in common that come at the same operation."""
    return _OF_A_DISK.sub(r"\1: an error \3", name)


def _sum(rows: Iterable[Row]) -> dict[str, int]:
    total = Counter({"fired": 0, "failed": 0, "problems": 0})
    for row in rows:
        total.update(fired=row["fired"], failed=row["failed"], problems=len(row["problems"]))
    return dict(total)
