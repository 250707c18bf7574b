"""Feed each parser files that a fuzzer makes, guided by the code that they reach.

    python benchmarks/fuzz.py [--millions 10] [--only TEXT]

``make fuzz`` installs atheris and runs it. Files are written to memory. What a parser raises and
may not raise ends it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
SHARES = {
    "metadata of a model": 0.17,
    "a model's places of weights": 0.17,
    "a model of anybody": 0.1,
    "whose a report is": 0.18,
    "a report": 0.14,
    "a job for the server": 0.18,
    "a note of what is owed": 0.02,
    "a template": 0.01,
    "a checkpoint": 0.01,
    "the memory of rungs": 0.02,
}
"""Of all executions: those that open archives of torch are a hundred times slower."""
MEMORY = Path("/dev/shm")  # noqa: S108 - where there is one


def fuzz(name: str, corpus: Path, runs: int) -> None:
    """Run a parser in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["onnxport"]):
        from faults.parsers import PARSERS
    parser = PARSERS[name]
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None, prefix="fuzz-"))
    options = [f"-runs={runs}", "-print_final_stats=1", f"-artifact_prefix={corpus}/"]
    options += ["-max_len=65536", "-timeout=60", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: parser.run(data, folder))
    atheris.Fuzz()


def main() -> None:
    """Run each parser in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=10.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--fuzz", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fuzz:
        name, corpus, runs = arguments.fuzz
        fuzz(name, Path(corpus), int(runs))
        return
    from faults.parsers import seeds
    from lockstep_report import about

    found: dict[str, object] = about()
    rows = found["parsers"] = {}
    with tempfile.TemporaryDirectory() as root:
        files = seeds(Path(root) / "run")
        for number, (name, share) in enumerate(SHARES.items()):
            if arguments.only not in name:
                continue
            corpus = Path(root) / f"{number}"
            corpus.mkdir()
            for index, content in enumerate(files[name]):
                (corpus / f"seed{index}").write_bytes(content)
            runs = int(arguments.millions * 1e6 * share)
            command = [sys.executable, __file__, "--fuzz", name, str(corpus), str(runs)]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            count = re.search(r"number_of_executed_units:\s*(\d+)", said.stderr)
            done = int(count[1]) if count else 0
            failure = "" if said.returncode == 0 else said.stderr[-1500:]
            rows[name] = {"executions": done, "failure": failure}
            print(f"{name}: {done} executions, {failure or 'no failure'}", flush=True)
    total = sum(row["executions"] for row in rows.values())
    found["executions"] = total
    if not arguments.only:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{total} executions")


if __name__ == "__main__":
    main()
