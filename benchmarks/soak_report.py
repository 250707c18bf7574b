"""What the soak writes: whether figures are flat, and a page to read."""

from __future__ import annotations

from statistics import linear_regression, median
from typing import Any

__all__ = ["MEASURED", "flat", "page"]

Found = dict[str, Any]

MEASURED = {
    "trainer_kib": "memory of the training process, KiB",
    "trainer_descriptors": "its descriptors",
    "trainer_threads": "its threads",
    "workers_kib": "memory of worker and courier, KiB",
    "workers_descriptors": "their descriptors",
    "files": "files and folders beside the checkpoints",
    "shared": "blocks of shared memory that they hold",
}


def flat(series: list[Found], name: str) -> dict[str, float]:
    """Return a figure early on, at the end, and its slope per hour.

    The first tenth is left out: a training has to load what it needs.
    """
    later = series[len(series) // 10 :]
    part = max(1, len(later) // 5)
    hours, values = [each["s"] / 3600 for each in later], [each[name] for each in later]
    slope = linear_regression(hours, values).slope if len(later) > 1 else 0.0
    return {
        "begin": median(values[:part]),
        "end": median(values[-part:]),
        "most": max(values),
        "per_hour": round(slope, 2),
    }


def page(found: Found) -> str:
    """Return the results to read."""
    training = found["training"]
    same = training["losses"] == found["undisturbed"]["losses"]
    losses = "the same, bit by bit," if same else "**other ones than**"
    lines = [
        f"""# Soak

{found["cpu"]}, {found["cores"]} cores, {found["memory"]}; {found["date"]}, commit \
{found["commit"]}. Made by `make soak`.

{found["hours"]:g} hours, a checkpoint every {found["every"]:g} s (saved under its name and as \
`last`), a fault every {found["fault_every"]:g} s on average. {training["steps"]} steps, \
{training["models"]} models proven, {found["judged"]} pairs of model and checkpoint looked at \
while both were there.

| | |
|---|---|
| wrong or half-written models | {len(found["wrong"])} |
| losses | {losses} as without the callback |
| processes left | {found["orphans"]} |
| not put right by the next start | {len(found["not_put_right"])} |
| reports of failures, by code | {training["failed"]} |

| | begin | end | most | per hour |
|---|---|---|---|---|"""
    ]
    for name, words in MEASURED.items():
        row = found["flat"][name]
        figures = f"{row['begin']:g} | {row['end']:g} | {row['most']:g} | {row['per_hour']:+g}"
        lines.append(f"| {words} | {figures} |")
    lines.append("""
Begin and end are medians of a fifth of the time each, without the first tenth; memory is what \
belongs to a process alone (`RssAnon`). Worker and courier are not always there.

| fault | times |
|---|---|""")
    lines += [f"| {name} | {times} |" for name, times in found["faults"].items()]
    return "\n".join(lines) + "\n"
