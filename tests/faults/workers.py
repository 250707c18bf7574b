"""Faults of the worker process: what user code does to it, and signals from outside."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from faults.catalogue import CATALOGUE, PATIENT, Fault, Outcome
from faults.ground import Net, meanwhile, workers_of
from onnxport import Background
from onnxport.worker.client import worker_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.catalogue import Site

CORES = ("dynamo", "trace", "script")
HASTY = Background(drain_s=120.0, stage_timeout_s=8.0)
SMALL = Background(drain_s=120.0, memory_gb=2.0)
_BYTES = 1 << 28


def in_worker() -> bool:
    """Tell whether this is a worker."""
    return "onnxport.worker.server" in str(getattr(sys.modules["__main__"], "__spec__", ""))


class Trapped(Net):
    """Does what a file says when it is run in the worker, as often as the file says.

    Args:
        trap: The file: what, and how often.
    """

    def __init__(self, trap: Path) -> None:
        super().__init__()
        self.trap = str(trap)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self.spring()
        return super().forward(x)

    @torch.jit.unused
    def spring(self) -> None:
        """Do it."""
        if not in_worker():
            return
        try:
            left = json.loads(Path(self.trap).read_text())
        except FileNotFoundError:
            return
        if left["times"] > 0:
            left["times"] -= 1
            Path(self.trap).write_text(json.dumps(left))
            with Path(f"{self.trap}.sprung").open("a") as file:
                file.write(f"{left['what']}\n")
            HARM[left["what"]]()


def _eat() -> None:
    eaten = []
    while True:
        eaten.append(bytearray(_BYTES))


def _recurse() -> None:
    _recurse()


def _interrupt() -> None:
    raise KeyboardInterrupt


def _fail() -> None:
    raise RuntimeError("of the user's own")


def _raise_memory_error() -> None:
    raise MemoryError


def _close_everything() -> None:
    os.closerange(3, 1024)


def _terminate() -> None:
    # As when a C++ exception leaves a thread.
    os.kill(os.getpid(), signal.SIGABRT)


def _overflow_the_stack() -> None:
    callback = ctypes.CFUNCTYPE(ctypes.c_int)
    sys.setrecursionlimit(10**9)

    def deeper() -> int:
        return int(callback(deeper)())

    deeper()


def _leave_threads() -> None:
    for _ in range(8):
        threading.Thread(target=time.sleep, args=(3600,)).start()
    raise RuntimeError("and threads that do not end")


HARM: dict[str, Callable[[], Any]] = {
    "a segmentation fault": partial(ctypes.string_at, 8),
    "os._exit": partial(os._exit, 3),
    "sys.exit": partial(sys.exit, 4),
    "abort": _terminate,
    "an endless wait": partial(time.sleep, 1e6),
    "memory without end": _eat,
    "recursion without end": _recurse,
    "a stack that overflows in C": _overflow_the_stack,
    "KeyboardInterrupt": _interrupt,
    "MemoryError": _raise_memory_error,
    "an exception": _fail,
    "all descriptors closed": _close_everything,
    "SIGSTOP to itself": partial(os.kill, 0, 0),  # see below
    "an exception, and threads that stay": _leave_threads,
}
HARM["SIGSTOP to itself"] = lambda: os.kill(os.getpid(), signal.SIGSTOP)

_HANG = {"an endless wait", "SIGSTOP to itself"}
_RAISES = {"an exception", "MemoryError", "recursion without end"}
"""What is said in a report and ends nothing; it is not tried again."""


def _springs(site: Site, what: str, core: str, times: int) -> Outcome:
    trap = site.folder / "trap.json"
    make = partial(Trapped, trap)
    trap.write_text(json.dumps({"what": what, "times": times}))
    hasty = HASTY if what in _HANG else PATIENT
    background = SMALL if what == "memory without end" else hasty
    run = site.train(export=site.export(core=core, background=background), make=make)
    sprung = Path(f"{trap}.sprung")
    fired = sprung.read_text() if sprung.exists() else ""
    trap.unlink()
    return site.judge(run, fired, make=make)


# --- signals ----------------------------------------------------------------------------------


def _signal(over: threading.Event, site: Site, number: int, stage: str, fired: list[str]) -> None:
    """Send the worker a signal at a random moment of a stage (``""``: of any)."""
    wait = site.random.uniform(0.0, 0.05 if stage else 1.5)
    worker = worker_for(PATIENT, 0)
    while not over.wait(0.001):
        current = worker._queue.current
        if current is not None and stage in {"", current.stage}:
            time.sleep(wait)
            pid = worker.pid
            if pid is not None:
                fired.append(f"{signal.Signals(number).name} at {current.stage}")
                os.kill(pid, number)
                return


def _is_signalled(site: Site, number: int, stage: str) -> Outcome:
    fired: list[str] = []
    before = set(workers_of())  # of other options; they end when they were idle for a while
    work = partial(_signal, site=site, number=number, stage=stage, fired=fired)
    with meanwhile(work):
        run = site.train()
    outcome = site.judge(run, "; ".join(fired))
    if len(found := [pid for pid in workers_of() if pid not in before]) > 1:
        outcome.problems.append(f"there are {len(found)} workers: {', '.join(map(_about, found))}")
    return outcome


def _about(pid: int) -> str:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:3]
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f"{pid} {b' '.join(words).decode()} ({state})"
    return f"{pid}, which is gone"


_LOST = "the model of a core that ends the worker twice; other cores are tried"


def _register() -> None:
    for what in HARM:
        for core in CORES if what not in _RAISES else ("trace",):
            if core == "script":  # compiling runs no forward; what runs it is the proof
                continue
            inject = partial(_springs, what=what, core=core, times=1)
            CATALOGUE.append(Fault(f"{what} in {core}", "worker", "", inject, 5))
    for what in ("a segmentation fault", "os._exit", "memory without end"):
        for core in ("dynamo", "trace"):
            inject = partial(_springs, what=what, core=core, times=1000)
            CATALOGUE.append(Fault(f"{what} in {core}, each time", "worker", _LOST, inject, 3))
    for name in ("SIGKILL", "SIGSEGV", "SIGTERM", "SIGINT", "SIGBUS"):
        number = signal.Signals[name]
        inject = partial(_is_signalled, number=number, stage="")
        times = 150 if name == "SIGKILL" else 10
        CATALOGUE.append(Fault(f"{name} at any moment", "worker", "", inject, times))
    for stage in (
        "waiting",
        "plan",
        "reference",
        "export",
        "prove",
        "template",
        "write",
        "publish",
    ):
        inject = partial(_is_signalled, number=signal.SIGKILL, stage=stage)
        CATALOGUE.append(Fault(f"SIGKILL at {stage}", "worker", "", inject, 20))


_register()
