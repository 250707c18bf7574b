"""Faults of the process that speaks to the tracking server, and of its notes."""

from __future__ import annotations

import errno
import shutil
import signal
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faults.catalogue import CATALOGUE, PATIENT, Fault, Outcome
from faults.disk import Rule, mounted
from faults.ground import meanwhile
from faults.leftovers import DAMAGE
from onnxport import MLflow

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from faults.catalogue import Run, Site
    from onnxport import OnnxExport

START_S = 4.0
"""So long it takes about, from its start to its last model."""


@cache
def _empty_store() -> Path:
    """Return a migrated, empty store: making one takes seconds, copying it takes none."""
    from mlflow import MlflowClient

    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


def _tracked(site: Site) -> tuple[OnnxExport, str]:
    """Return a callback that speaks to a real store, and the address of that."""
    store = site.folder / "mlflow.db"
    shutil.copyfile(_empty_store(), store)
    uri = f"sqlite:///{store}"
    return site.export(mlflow=MLflow(tracking_uri=uri), background=PATIENT), uri


def _judged(site: Site, run: Run, fired: str, uri: str) -> Outcome:
    """Look at what the server holds, too: the models that are there, whole, and no others."""
    from mlflow import MlflowClient

    outcome = site.judge(run, fired, again=False)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("onnxport")
    held = client.search_logged_models([experiment.experiment_id]) if experiment else []
    told = sorted(f"{model.name} {model.status.value}" for model in held)
    models = site.models or site.checkpoints
    there = sorted(f"{model.stem} READY" for model in models.glob("*.onnx"))
    if told != there:
        outcome.problems.append(f"the server holds {told}, and there is {there}")
    if left := sorted(note.name for note in models.glob(".*.tracking")):
        outcome.problems.append(f"notes are left: {left}")
    last = {report.path: report for report in run.reports if Path(str(report.path)).exists()}
    missing = [r.tracking.missing for r in last.values() if r.tracking and r.tracking.missing]
    outcome.problems.extend(missing)
    outcome.problems.extend(site.start_again())
    return outcome


def _process_of(export: OnnxExport, over: threading.Event) -> Any:
    """Wait for the process; ``None``: training is over."""
    while not over.wait(0.01):
        process = getattr(export._run._announced.outbox, "_process", None)
        if process is not None:
            return process
    return None


def _is_signalled(site: Site, number: int) -> Outcome:
    """Send it a signal at a random moment."""
    export, uri = _tracked(site)
    fired: list[str] = []
    wait = site.random.uniform(0.0, START_S)

    def send(over: threading.Event) -> None:
        process = _process_of(export, over)
        if process is not None and not over.wait(wait):
            process.send_signal(number)
            fired.append(signal.Signals(number).name)

    with meanwhile(send):
        run = site.train(export=export)
    return _judged(site, run, "; ".join(fired), uri)


def _note_is_damaged(site: Site, damage: Callable[[Path, Site], None]) -> Outcome:
    """Stop it until there is a note of a model that stays, and damage that."""
    export, uri = _tracked(site)
    fired: list[str] = []
    note = site.checkpoints / f".epoch=0-step={site.random.choice([6, 8])}.onnx.tracking"

    def harm(over: threading.Event) -> None:
        process = _process_of(export, over)
        if process is None:
            return
        process.send_signal(signal.SIGSTOP)
        while not over.wait(0.001):
            if note.exists():
                damage(note, site)
                fired.append(note.name)
                break
        process.send_signal(signal.SIGCONT)

    with meanwhile(harm):
        run = site.train(export=export)
    return _judged(site, run, "; ".join(fired), uri)


def _disk_fails(site: Site, operation: str) -> Outcome:
    """Let the disk fail twice where notes are concerned."""
    with mounted(site.folder / "bad") as disk:
        site.models = disk.folder / "models"
        export, uri = _tracked(site)
        after = site.random.randrange(2)
        rule = Rule(
            operations=(operation,), match="*.tracking", after=after, times=2, error=errno.EIO
        )
        disk.fail(rule)
        run = site.train(export=export)
        fired = disk.fired
        disk.fail()
        return _judged(site, run, "; ".join(fired), uri)


def _register() -> None:
    area = "courier"
    for name, times in (("SIGKILL", 20), ("SIGSEGV", 5), ("SIGTERM", 5), ("SIGINT", 5)):
        inject = partial(_is_signalled, number=signal.Signals[name])
        CATALOGUE.append(Fault(f"{name} at any moment", area, "", inject, times))
    for name in ("is empty", "is cut off", "has wrong bytes", "is random", "is nested without end"):
        inject = partial(_note_is_damaged, damage=DAMAGE[name])
        CATALOGUE.append(Fault(f"a note for the server {name}", area, "", inject, 5))
    for operation in ("open", "read", "getattr", "rename"):
        inject = partial(_disk_fails, operation=operation)
        CATALOGUE.append(Fault(f"EIO at {operation} of notes", area, "", inject, 5))


_register()
