"""Inject every kind of fault many times, and write down what came of it.

    python benchmarks/faults.py [--only TEXT] [--times N] [--seed S]

``make faults`` runs all. After each injection training must have gone on bit by bit as without the
callback (or have died for the user's own reason), nothing wrong may have the name of a model, and
after the next start each checkpoint has its model and nothing else lies about. Results go to
``benchmarks/results/faults.json`` and, as a table, to ``docs/reliability.md``. It can be stopped,
and goes on with what is missing; ``--fresh`` begins anew, and ``--results`` takes the place of
``faults.json``, for parts that run side by side; ``--merge`` adds what such parts have found.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import registered  # noqa: E402 - found by the line above
from faults.catalogue import Fault, Outcome, Site  # noqa: E402
from faults_report import put_into, tables, total_of  # noqa: E402
from lockstep_report import about, part_about  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
NOTHING: dict[str, Any] = {"injected": 0, "fired": 0, "failed": 0, "seconds": 0.0}


def injected(fault: Fault, seed: int) -> tuple[Outcome, float]:
    """Inject a fault once; whatever the harness itself raises is a problem, too."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        try:
            outcome = fault.inject(Site(Path(folder), random.Random(seed)))  # noqa: S311
        except Exception:  # noqa: BLE001 - it is shown
            outcome = Outcome("", [traceback.format_exc()])
    if outcome.failed and not fault.lost:
        outcome.problems.append(f"{outcome.failed} checkpoints have no model")
    return outcome, time.perf_counter() - start


def inject_all(fault: Fault, row: dict[str, Any], times: int, seed: int) -> Iterator[None]:
    """Inject a fault as often as it is still to be; stop after each time, to be written down."""
    while row["injected"] < times:
        outcome, seconds = injected(fault, seed + row["injected"])
        row["injected"] += 1
        row["fired"] += bool(outcome.fired)
        row["failed"] += outcome.failed
        row["seconds"] = round(row["seconds"] + seconds, 2)
        row["problems"] += [f"try {row['injected']}: {text}" for text in outcome.problems]
        row |= part_about()
        yield
    print(
        f"{fault.area}: {fault.name}: {row['fired']}/{row['injected']} fired, "
        f"{len(row['problems'])} problems, {row['seconds'] / max(1, row['injected']):.1f} s",
        *row["problems"][:3],
        sep="\n    ",
        flush=True,
    )


def written(*parts: Path) -> dict[str, Any]:
    """Return what was found so far, in all parts, in the order of the catalogue."""
    found: dict[str, Any] = {"faults": {}}
    for part in parts:
        if part.exists():
            there = json.loads(part.read_text(encoding="utf-8"))
            found = found | there | {"faults": found["faults"] | there["faults"]}
    names = [f"{fault.area}: {fault.name}" for fault in registered()]
    rows = found["faults"]
    return found | {"faults": {name: rows[name] for name in names if name in rows}}


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="text in the name or area of a fault")
    parser.add_argument("--times", type=int, help="instead of as often as each fault says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="instead of running")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = arguments.results
    found = (written() if arguments.fresh else written(results)) | about()
    for fault in [] if arguments.merge else registered():
        name = f"{fault.area}: {fault.name}"
        if arguments.only in name:
            row = found["faults"].setdefault(name, dict(NOTHING, problems=[]))
            row["lost"] = fault.lost
            times = fault.times if arguments.times is None else arguments.times
            for _ in inject_all(fault, row, times, arguments.seed):
                results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = written(results, *arguments.merge)
    results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(total_of(found))
    if results == RESULTS:
        page = put_into(PAGE.read_text(encoding="utf-8"), tables(found))
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
