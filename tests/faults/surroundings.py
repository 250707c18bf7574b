"""Faults of the machine and the environment around a training."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from faults.catalogue import CATALOGUE, Fault, Outcome
from faults.weights import AtStep
from onnxport import Background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faults.catalogue import Site

FRESH = Background(drain_s=121.0)
"""A worker of its own, that is started under the fault."""


@contextmanager
def changed(**variables: str | None) -> Iterator[None]:
    """Change the environment for the block; ``None``: without the variable."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    """Lower a limit of this process, and of those that it starts, for the block."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def _few_descriptors(site: Site) -> Outcome:
    used = len(list(Path("/proc/self/fd").iterdir()))
    with limited(resource.RLIMIT_NOFILE, used + site.random.randrange(4, 40)):
        run = site.train(export=site.export(background=FRESH))
    return site.judge(run, f"{used} in use")


def _small_files(site: Site) -> Outcome:
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with limited(resource.RLIMIT_FSIZE, 1 << 20):
            run = site.train(export=site.export(background=FRESH))
    finally:
        signal.signal(signal.SIGXFSZ, before)
    return site.judge(run, "files of 1 MiB at most")


def _without_tmpdir(site: Site) -> Outcome:
    nowhere = str(site.folder / "nowhere")  # the trainer has chosen its own before
    with changed(TMPDIR=nowhere, TEMP=nowhere, TMP=nowhere):
        run = site.train(export=site.export(background=FRESH))
    return site.judge(run, "TMPDIR does not exist")


def _without_home(site: Site) -> Outcome:
    with changed(HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere", ONNXPORT_CACHE_DIR=None):
        run = site.train(export=site.export(background=FRESH))
    return site.judge(run, "HOME cannot be written")


def _no_python(site: Site, executable: str | None) -> Outcome:
    before = sys.executable
    sys.executable = executable  # type: ignore[assignment]
    try:
        run = site.train(export=site.export(background=FRESH))
    finally:
        sys.executable = before
    return site.judge(run, f"sys.executable is {executable!r}")


def _clock_jumps(site: Site, by_s: float) -> Outcome:
    """``time.time`` is another one from a step on, in the trainer; no test may set the clock."""
    original = time.time
    step = AtStep(2, lambda _: setattr(time, "time", lambda: original() + by_s))
    try:
        run = site.train(step)
    finally:
        time.time = original
    return site.judge(run, step.fired)


def _folder_goes(site: Site, replace: Callable[[Path], Any]) -> Outcome:
    """The folder of models is removed in the middle, or something else takes its place."""
    site.models = site.folder / "models"

    def take(_: Any) -> None:
        import shutil

        shutil.rmtree(site.models, ignore_errors=True)
        replace(site.models)

    step = AtStep(site.random.choice((3, 5)), take)
    run = site.train(step)
    if site.models.is_file() or site.models.is_symlink():
        site.models.unlink()
    # The notes are gone with the folder, so the next start does not know of these checkpoints.
    return site.judge(run, step.fired, owed=False)


def _cwd_goes(site: Site) -> Outcome:
    before = Path.cwd()
    gone = site.folder / "gone"
    gone.mkdir()
    os.chdir(gone)
    try:
        gone.rmdir()
        run = site.train(export=site.export(background=FRESH))
    finally:
        os.chdir(before)
    return site.judge(run, "the current folder was removed")


def _two_in_one_folder(site: Site) -> Outcome:
    """Two trainings write into one folder, each with names of its own and with ``last`` of both."""
    outcomes: list[Any] = []
    script = (
        "import sys; from pathlib import Path; from faults.ground import train;"
        "from onnxport import OnnxExport; folder = Path(sys.argv[1]);"
        "run = train(folder, OnnxExport(mlflow=False, core='trace', background=False), steps=20);"
        "print(run.error, len(run.losses))"
    )
    command = [sys.executable, "-c", script, str(site.checkpoints)]
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    others = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outcomes = [other.communicate(timeout=200)[0].splitlines()[-1] for other in others]
    outcome = Outcome("; ".join(outcomes))
    if set(outcomes) != {"None 20"}:
        outcome.problems.append(f"trainings have ended like this: {outcomes}")
    outcome.problems.extend(site.start_again())
    return outcome


class _Forks(Callback):
    """Forks the training process in the middle; the child ends at once."""

    fired = ""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            self.fired = "at step 4"


def _forks(site: Site) -> Outcome:
    fork = _Forks()
    run = site.train(fork)
    return site.judge(run, fork.fired)


def _is_busy(site: Site) -> Outcome:
    """All cores have other work."""
    over = threading.Event()
    words = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(words) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        run = site.train()
    finally:
        over.set()
        for burner in burners:
            burner.kill()
            burner.wait()
    return site.judge(run, f"{len(burners)} processes")


def _strict_warnings(site: Site) -> Outcome:
    with changed(PYTHONWARNINGS="error"):
        run = site.train(export=site.export(background=FRESH))
    return site.judge(run, "PYTHONWARNINGS=error")


def _register() -> None:
    area = "machine"
    for name, inject in {
        "few file descriptors are left": _few_descriptors,
        "files may not be large": _small_files,
        "TMPDIR does not exist": _without_tmpdir,
        "HOME cannot be written": _without_home,
        "sys.executable is None": partial(_no_python, executable=None),
        "sys.executable is no program": partial(_no_python, executable="/bin/false"),
        "sys.executable does not exist": partial(_no_python, executable="/nowhere/python"),
        "the clock jumps an hour ahead": partial(_clock_jumps, by_s=3600.0),
        "the clock jumps a year back": partial(_clock_jumps, by_s=-3.2e7),
        "the current folder is removed": _cwd_goes,
        "two trainings in one folder": _two_in_one_folder,
        "the training process forks": _forks,
        "all cores are busy": _is_busy,
        "warnings are errors": _strict_warnings,
    }.items():
        CATALOGUE.append(Fault(name, area, "", inject, 5))
    for name, replace in {
        "the folder of models is removed": lambda _: None,
        "a file is where the folder of models was": Path.touch,
        "a link to nowhere is where the folder of models was": lambda path: path.symlink_to("/no"),
    }.items():
        inject = partial(_folder_goes, replace=replace)
        lost = "models that were in it; reports name the others"
        CATALOGUE.append(Fault(name, area, lost, inject, 5))


_register()
