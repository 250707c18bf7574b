"""Inject every kind of fault many times, and write down what came of it.

    python benchmarks/faults.py [--only TEXT] [--times N] [--seed S]

``make faults`` runs all. After each injection training must have gone on bit by bit as without the
callback (or have died for the user's own reason), nothing wrong may have the name of a model, and
after the next start each checkpoint has its model and nothing else lies about. Results go to
``benchmarks/results/faults.json`` and, as a table, to ``docs/reliability.md``. It can be stopped,
and goes on with what is missing; ``--fresh`` begins anew.
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
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import registered  # noqa: E402 - found by the line above
from faults.catalogue import Fault, Outcome, Site  # noqa: E402
from lockstep_report import about  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"


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


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="text in the name or area of a fault")
    parser.add_argument("--times", type=int, help="instead of as often as each fault says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {}
    if arguments.results.exists() and not arguments.fresh:
        found = json.loads(arguments.results.read_text(encoding="utf-8"))
    rows = found.setdefault("faults", {})
    for fault in registered():
        if arguments.only not in f"{fault.area}: {fault.name}":
            continue
        row = rows.setdefault(
            f"{fault.area}: {fault.name}",
            {"injected": 0, "fired": 0, "failed": 0, "problems": [], "seconds": 0.0},
        )
        row["lost"] = fault.lost
        wanted = fault.times if arguments.times is None else arguments.times
        while row["injected"] < wanted:
            outcome, seconds = injected(fault, arguments.seed + row["injected"])
            row["injected"] += 1
            row["fired"] += bool(outcome.fired)
            row["failed"] += outcome.failed
            row["seconds"] = round(row["seconds"] + seconds, 2)
            row["problems"] += [f"try {row['injected']}: {text}" for text in outcome.problems]
            found |= about()
            arguments.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(
            f"{fault.area}: {fault.name}: {row['fired']}/{row['injected']} fired, "
            f"{len(row['problems'])} problems, {row['seconds'] / max(1, row['injected']):.1f} s",
            *row["problems"][:3],
            sep="\n    ",
            flush=True,
        )
    totals = Counter[str]()
    for row in rows.values():
        totals.update(injected=row["injected"], fired=row["fired"], problems=len(row["problems"]))
    print(f"{len(rows)} kinds, {dict(totals)}")


if __name__ == "__main__":
    main()
