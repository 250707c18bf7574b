"""Faults of the training process: killed, ended, or left by an error, at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from faults.catalogue import CATALOGUE, STEPS, Fault, Outcome
from faults.ground import is_running, workers_of

if TYPE_CHECKING:
    from faults.catalogue import Site

ENDLESS = 100_000
END_LIMIT_S = 60.0

SCRIPT = """
import ctypes, os, signal, sys
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from faults.ground import train
from onnxport import OnnxExport

folder, steps, at, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

class Ends(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == at:
            (folder / "ended").touch()
            exec(how)

run = train(folder, OnnxExport(mlflow=False, core="trace"), Ends(), steps=steps)
print(repr(run.error), len(run.losses), flush=True)
"""


def _started(site: Site, steps: int, at: int = -1, how: str = "") -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    site.checkpoints.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(site.checkpoints), str(steps), str(at), how],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _until_saved(site: Site, process: subprocess.Popen[str], limit_s: float = 120.0) -> None:
    """Wait for the first checkpoint."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        if any(site.checkpoints.glob("*.ckpt")):
            return
        time.sleep(0.01)


def _is_signalled(site: Site, number: int, *, again: bool = True) -> Outcome:
    """Send a signal at a random moment: while it starts, at the first export, long after it."""
    process = _started(site, ENDLESS)
    workers: list[int] = []
    try:
        _until_saved(site, process)
        time.sleep(site.random.choice((0.0, 0.2, 1.0)) * site.random.random() * 5)
        workers = workers_of(process.pid)
        process.send_signal(number)
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Outcome(signal.Signals(number).name, ["it did not end"])
    finally:
        process.kill()
        process.wait()
    outcome = Outcome(f"{signal.Signals(number).name}, {len(workers)} workers")
    _no_orphans(workers, outcome)
    outcome.problems.extend(site.wrong())
    if again:
        outcome.problems.extend(site.start_again())
    return outcome


def _no_orphans(workers: list[int], outcome: Outcome) -> None:
    end = time.monotonic() + 10.0
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    if any(map(is_running, workers)):
        outcome.problems.append("a worker has outlived its trainer")


def _ends_itself(site: Site, how: str) -> Outcome:
    """The training process ends by its own doing, in the middle."""
    at = site.random.randrange(3, STEPS)
    process = _started(site, STEPS, at, how)
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return Outcome(how, ["it did not end"])
    fired = f"at step {at}: {said.strip()}" if (site.checkpoints / "ended").exists() else ""
    outcome = Outcome(fired)
    (site.checkpoints / "ended").unlink(missing_ok=True)
    outcome.problems.extend(site.wrong())
    outcome.problems.extend(site.start_again())
    return outcome


def _stops_and_goes_on(site: Site) -> Outcome:
    """SIGSTOP for a moment, as a scheduler or a laptop does; then training goes on as ever."""
    process = _started(site, STEPS * 4)
    _until_saved(site, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=120)
    outcome = Outcome("for two seconds")
    if said.strip() != f"None {STEPS * 4}":
        outcome.problems.append(f"training said {said!r}")
    outcome.problems.extend(site.wrong())
    return outcome


def _register() -> None:
    area = "training process"
    for name, times in {
        "SIGKILL": 300,
        "SIGTERM": 20,
        "SIGINT": 20,
        "SIGHUP": 10,
        "SIGSEGV": 10,
    }.items():
        inject = partial(_is_signalled, number=signal.Signals[name])
        lost = "models on their way, until the next start"
        CATALOGUE.append(Fault(f"{name} at any moment", area, lost, inject, times))
    for name, how in {
        "os._exit": "os._exit(5)",
        "sys.exit": "sys.exit(6)",
        "a segmentation fault": "ctypes.string_at(8)",
        "abort": "os.abort()",
        "an exception of another callback": "raise ZeroDivisionError('of the user')",
        "KeyboardInterrupt": "raise KeyboardInterrupt",
        "SIGINT twice": "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]",
    }.items():
        inject = partial(_ends_itself, how=how)
        CATALOGUE.append(Fault(name, area, "models on their way, until the next start", inject, 10))
    CATALOGUE.append(Fault("SIGSTOP, then SIGCONT", area, "", _stops_and_goes_on, 10))


_register()
