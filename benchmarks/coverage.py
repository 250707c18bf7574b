"""Measure of how many models ``onnxport.export`` makes an ONNX model, and whether it is right.

Every case of the zoo is exported by both raw cores with axes written by hand, and by onnxport with
no argument, each in a process of its own with a time limit. The models are then compared with
eager PyTorch at sizes and values that no export has seen. Run it with ``make coverage`` or::

    python benchmarks/coverage.py [--filter PART,PART] [--modes onnxport] [--merge] [--check-eager]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# This file is called like a package that others import if it is there.
sys.modules.setdefault("coverage", None)  # type: ignore[arg-type]
sys.path.append(str(Path(__file__).parent.parent))

import coverage_modes as modes_of  # noqa: E402
import torch  # noqa: E402
from coverage_report import write_results  # noqa: E402
from zoo import all_cases  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo.base import Case

MODES = ("raw_dynamo", "raw_torchscript", "onnxport")
PRELOAD = ("onnxruntime", "onnxscript", "transformers", "lightning.pytorch", "onnxport")
POLL_S = 0.02


@dataclass
class Slot:
    """A case at work: the mode that runs and those that wait."""

    case: Case
    waiting: list[str]
    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    mode: str = ""
    pid: int = 0
    started: float = 0.0


class Runner:
    """Runs each (case, mode) in a forked process, so imports are paid once and crashes stay there.

    Args:
        limit_s: Time limit of one process.
        jobs: How many at a time.
        done: Called with each finished row.
    """

    def __init__(self, limit_s: float, jobs: int, done: Callable[[dict[str, Any]], None]) -> None:
        self._limit_s = limit_s
        self._jobs = jobs
        self._done = done

    def run(self, cases: list[Case], modes: tuple[str, ...]) -> None:
        """Run every case in every mode."""
        queue = list(cases)
        slots: list[Slot] = []
        with tempfile.TemporaryDirectory(prefix="coverage-") as root:
            try:
                while queue or slots:
                    while queue and len(slots) < self._jobs:
                        case = queue.pop(0)
                        folder = Path(root) / case.name.replace("/", "--")
                        folder.mkdir()
                        slots.append(Slot(case, list(modes), folder))
                        self._start(slots[-1])
                    time.sleep(POLL_S)
                    slots = [slot for slot in slots if self._step(slot)]
            finally:
                for slot in slots:
                    _kill(slot.pid)

    def _step(self, slot: Slot) -> bool:
        """Collect a process that has ended or run too long; return whether the case goes on."""
        pid, status = os.waitpid(slot.pid, os.WNOHANG)
        late = time.monotonic() - slot.started > self._limit_s
        if pid == 0 and not late:
            return True
        if pid == 0:
            _kill(slot.pid)
            os.waitpid(slot.pid, 0)
        else:
            _kill(slot.pid)  # What it may have started itself.
        self._collect(slot, status, late=pid == 0)
        if slot.waiting or self._wants_latency(slot):
            self._start(slot)
            return True
        self._finish(slot)
        return False

    def _start(self, slot: Slot) -> None:
        slot.mode = slot.waiting.pop(0) if slot.waiting else "latency"
        slot.started = time.monotonic()
        sys.stdout.flush()
        slot.pid = os.fork()
        if slot.pid == 0:
            _child(slot)

    def _collect(self, slot: Slot, status: int, *, late: bool) -> None:
        result = slot.folder / f"{slot.mode}.json"
        stage = slot.folder / f"{slot.mode}.stage"
        where = stage.read_text() if stage.exists() else "start"
        if late:
            row = {"outcome": "timeout", "reason": f"over {self._limit_s:g} s in {where}"}
        elif result.exists():
            row = json.loads(result.read_text())
        else:
            number = os.waitstatus_to_exitcode(status)
            name = signal.Signals(-number).name if number < 0 else f"exit status {number}"
            row = {"outcome": "crashed", "reason": f"{name} in {where}"}
        slot.rows[slot.mode] = row

    @staticmethod
    def _rights(slot: Slot) -> list[str]:
        return [mode for mode, row in slot.rows.items() if row.get("outcome") == "right"]

    def _wants_latency(self, slot: Slot) -> bool:
        right = self._rights(slot)
        return "latency" not in slot.rows and "onnxport" in right and len(right) > 1

    def _finish(self, slot: Slot) -> None:
        times = slot.rows.pop("latency", {})
        case = slot.case
        for mode, row in slot.rows.items():
            row.pop("names", None)
            about = {"case": case.name, "family": case.family, "mode": mode, "ours": case.ours}
            if mode == "onnxport" and "onnxport" in times:
                row["latency_ms"] = times
            self._done(about | row | {"inexpressible": case.inexpressible, "notes": case.notes})
        shutil.rmtree(slot.folder, ignore_errors=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _child(slot: Slot) -> None:
    """Run one mode in this forked process and leave without any clean-up of the parent's."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(slot.folder / f"{slot.mode}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Nothing learnt in one case may help or harm another.
    os.environ["XDG_CACHE_HOME"] = str(slot.folder / "cache")
    os.chdir(slot.folder)
    try:
        row = _work(slot)
    except BaseException as error:  # noqa: BLE001 - the benchmark's own mistake, shown as such
        traceback.print_exc()
        row = {"outcome": "failed", "reason": f"benchmark: {modes_of.first_line(error)}"}
    partial = slot.folder / f"{slot.mode}.partial"
    partial.write_text(json.dumps(row, default=str))
    partial.rename(slot.folder / f"{slot.mode}.json")
    os._exit(0)


def _work(slot: Slot) -> dict[str, Any]:
    stage = slot.folder / f"{slot.mode}.stage"

    def enter(name: str) -> None:
        stage.write_text(name)

    warnings.simplefilter("ignore")
    if slot.mode == "eager":
        return modes_of.check_eager(slot.case, enter)
    if slot.mode == "latency":
        right = Runner._rights(slot)  # noqa: SLF001
        names = {mode: slot.rows[mode].get("names") for mode in right}
        return modes_of.latency(slot.case, slot.folder, right, names)
    return modes_of.run_mode(slot.case, slot.mode, slot.folder, enter)


def preload() -> None:
    """Import what every process needs, and export once, so tables and registries are filled."""
    for name in PRELOAD:
        try:
            __import__(name)
        except ImportError as error:
            print(f"{name} is not here: {error}")
    net = torch.nn.Linear(2, 2).eval()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        shapes = {"input": {0: "batch"}}
        sample = (torch.zeros(3, 2),)
        torch.onnx.export(net, sample, dynamo=True, dynamic_shapes=shapes, verbose=False)
        torch.onnx.export(net, sample, f"{folder}/net.onnx", dynamo=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--filter", default="", help="parts of names, with commas: which cases to run"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=120)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--merge", action="store_true", help="keep other rows of the last run")
    parser.add_argument(
        "--check-eager", action="store_true", help="run PyTorch only; write nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the cases")
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    parts = options.filter.split(",")
    cases = [case for case in all_cases() if any(part in case.name for part in parts)]
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    modes = ("eager",) if options.check_eager else tuple(options.modes.split(","))
    unknown = set(modes) - {*MODES, "eager"}
    if unknown or not cases:
        print(f"No case matches, or no such mode: {sorted(unknown)}", file=sys.stderr)
        return 2
    preload()
    rows: list[dict[str, Any]] = []

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        if options.check_eager and row["outcome"] == "right":
            return
        spent = f"{row['export_s']:7.2f} s" if "export_s" in row else "         "
        print(f"{row['case']:44} {row['mode']:16} {row['outcome']:8}{spent}  {row['reason'][:110]}")
        sys.stdout.flush()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    try:
        Runner(options.limit_s, options.jobs, done).run(cases, modes)
    except KeyboardInterrupt:
        print("Stopped: what has finished is written.", file=sys.stderr)
    spent = time.monotonic() - started
    if options.check_eager:
        bad = [row for row in rows if row["outcome"] != "right"]
        print(f"{len(rows) - len(bad)} of {len(rows)} cases run at all their sizes.")
        return 1 if bad else 0
    write_results(options.out, rows, spent, merge=options.merge)
    return 0


if __name__ == "__main__":
    sys.exit(main())
