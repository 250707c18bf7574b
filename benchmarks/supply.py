"""Count what an installation brings, and measure what an import costs.

    python benchmarks/supply.py

Writes ``benchmarks/results/supply.json`` and ``supply.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from lockstep_report import about, part_about

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXTRAS = ("", "ort", "lightning,ort", "all")
RUNS = 7
IMPORTS = {
    "torch": "import torch",
    "lightning.pytorch": "import lightning.pytorch",
    "onnxport": "import onnxport",
    "onnxport.OnnxExport, after lightning": (
        "import lightning.pytorch; start = time.perf_counter(); from onnxport import OnnxExport"
    ),
    "onnxport.export, after torch": (
        "import torch; start = time.perf_counter(); from onnxport import export"
    ),
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def installed(wheel: Path, extra: str) -> list[str]:
    """Return the packages that an installation into an empty environment has."""
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
    command += ["-c", str(ROOT / "constraints.txt"), "--report", "-", wanted]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return sorted(found["metadata"]["name"] for found in json.loads(said)["install"])


def seconds(statement: str) -> float:
    """Return the median time of an import in a process of its own, files in memory."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    return round(median(float(subprocess.check_output(command)) for _ in range(RUNS)), 3)


def main() -> None:
    """Count, measure and write."""
    found: dict[str, Any] = about() | part_about()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-qq",
            "--no-deps",
            "-w",
            folder,
            str(ROOT),
        ]
        subprocess.run([*command, "--no-build-isolation"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        found["wheel_kib"] = wheel.stat().st_size >> 10
        found["packages"] = {extra: installed(wheel, extra) for extra in EXTRAS}
    found["seconds"] = {name: seconds(statement) for name, statement in IMPORTS.items()}
    (RESULTS / "supply.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [
        f"""# What an installation brings, and what an import costs

{found["cpu"]}, {found["cores"]} cores; {found["date"]}, commit {found["commit"]}. Made by \
`make supply`. The wheel has {found["wheel_kib"]} KiB.

| | packages, onnxport included |
|---|---|"""
    ]
    rows += [
        f"| `onnxport{f'[{extra}]' if extra else ''}` | {len(names)} |"
        for extra, names in found["packages"].items()
    ]
    rows += ["", f"| import | seconds, median of {RUNS} |", "|---|---|"]
    rows += [f"| {name} | {value:g} |" for name, value in found["seconds"].items()]
    text = "\n".join(rows) + "\n"
    (RESULTS / "supply.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
