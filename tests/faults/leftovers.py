"""Faults of files that an earlier run has left: damaged, replaced, or of somebody else."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from faults.catalogue import CATALOGUE, Fault, Outcome
from faults.ground import left_behind
from onnxport import Background, OnnxExport, resume
from onnxport.worker.client import worker_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from faults.catalogue import Site


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def _emptied(file: Path, _: Site) -> None:
    file.write_bytes(b"")


def _truncated(file: Path, site: Site) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: site.random.randrange(len(content))])


def _garbled(file: Path, site: Site) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(8):
        content[site.random.randrange(len(content))] = site.random.randrange(256)
    file.write_bytes(content)


def _random(file: Path, site: Site) -> None:
    file.write_bytes(site.random.randbytes(4096))


def _bombed(file: Path, site: Site) -> None:
    file.write_bytes(pickle.dumps(_Bomb(site.folder / "exploded")))


def _folder(file: Path, _: Site) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("of somebody else")


def _loop(file: Path, _: Site) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _deep(file: Path, _: Site) -> None:
    file.write_text("[" * 100_000)


DAMAGE: dict[str, Callable[[Path, Site], None]] = {
    "is empty": _emptied,
    "is cut off": _truncated,
    "has wrong bytes": _garbled,
    "is random": _random,
    "is a pickle that runs code": _bombed,
    "is a folder": _folder,
    "is a link to itself": _loop,
    "is nested without end": _deep,
}
FILES = {
    "the note of what is owed": "*.pending",
    "the template": "*.onnxport-template",
    "a report": "*.onnx.json",
    "a model": "*.onnx",
    "a checkpoint": "epoch*.ckpt",
}


IMPATIENT = Background(drain_s=0.0)


class WaitsForFirst(Callback):
    """Waits for the first model, so that there is a template, then stops the worker: debts stay."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        end = time.monotonic() + 60.0
        while trainer.global_step == 4 and time.monotonic() < end:
            if any(self.site.checkpoints.glob("*.onnx")):
                pid = worker_for(IMPATIENT, 0).pid
                if pid is not None:
                    os.kill(pid, signal.SIGSTOP)
                return
            time.sleep(0.01)


def _is_damaged(site: Site, pattern: str, damage: Callable[[Path, Site], None]) -> Outcome:
    """Leave debts behind, damage a file, then resume, and train again.

    What was damaged, and its checkpoint's model, may be wrong or missing afterwards; nothing else.
    """
    site.train(WaitsForFirst(site), export=site.export(background=IMPATIENT))
    if pattern in {"*.onnx", "*.onnx.json"}:
        site.train()
    files = sorted(path for path in site.checkpoints.glob(pattern) if path.is_file())
    if not files:
        return Outcome("")
    file = site.random.choice(files)
    damage(file, site)
    stem = file.name.removeprefix(".").partition(".onnx")[0].removesuffix(".ckpt")
    outcome = Outcome(file.name)
    resume(site.checkpoints)
    outcome.problems.extend(site.wrong())
    if pattern in {"*.onnx", "epoch*.ckpt"} or file.is_dir() or file.is_symlink():
        _take_away(file)  # as whoever finds it has to
    outcome.problems.extend(site.start_again())
    outcome.problems[:] = [text for text in outcome.problems if stem not in text]
    if (site.folder / "exploded").exists():
        outcome.problems.append("code of a file was run")
    return outcome


def _take_away(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def _belongs_to_others(site: Site) -> Outcome:
    """Files with the names of models that are not ours stay as they are."""
    site.checkpoints.mkdir()
    names = ("epoch=0-step=2.onnx", "last.onnx.json")
    for name in names:
        (site.checkpoints / name).write_text("mine")
    run = site.train()
    outcome = Outcome("two files of somebody else")
    stay = all((site.checkpoints / name).read_text() == "mine" for name in names)
    if not stay:
        outcome.problems.append("a file of somebody else is gone")
    if run.error is not None or not any(report.ok for report in run.reports):
        outcome.problems.append(f"{run.error!r}, {[report.error for report in run.reports]}")
    return outcome


def _staging_is_left(site: Site) -> Outcome:
    """Folders of processes that were killed are swept, whatever is in them."""
    site.checkpoints.mkdir()
    for number, name in enumerate((".onnxport-abc", ".onnxport-def", ".onnxport-ghi")):
        (site.checkpoints / name / "deeper").mkdir(parents=True)
        (site.checkpoints / name / "last.onnx").write_bytes(site.random.randbytes(100 * number))
    (site.checkpoints / ".last.onnx.pending.tmp").write_bytes(b"")
    (site.checkpoints / ".last.onnx.tracking.tmp").write_bytes(b"{")
    run = site.train()
    outcome = site.judge(run, "three folders and two files", again=False)
    outcome.problems.extend(left_behind(site.checkpoints))
    return outcome


def _cache_is_damaged(site: Site, damage: Callable[[Path, Site], None]) -> Outcome:
    """The memory of which rung has won is damaged."""
    cache = site.folder / "cache"
    before = os.environ.get("ONNXPORT_CACHE_DIR")
    os.environ["ONNXPORT_CACHE_DIR"] = str(cache)
    try:
        site.train(export=OnnxExport(mlflow=False, core="trace", background=False), steps=2)
        files = sorted(cache.rglob("*.json"))
        for file in files:
            damage(file, site)
        run = site.train(export=site.export(background=False))
        return site.judge(run, f"{len(files)} files" if files else "")
    finally:
        if before is None:
            del os.environ["ONNXPORT_CACHE_DIR"]
        else:
            os.environ["ONNXPORT_CACHE_DIR"] = before


def _register() -> None:
    area = "files of an earlier run"
    for what, pattern in FILES.items():
        for how, damage in DAMAGE.items():
            inject = partial(_is_damaged, pattern=pattern, damage=damage)
            CATALOGUE.append(Fault(f"{what} {how}", area, "what was damaged", inject, 5))
    for how, damage in DAMAGE.items():
        inject = partial(_cache_is_damaged, damage=damage)
        CATALOGUE.append(Fault(f"the memory of rungs {how}", area, "", inject, 3))
    CATALOGUE.append(Fault("names are taken by others", area, "", _belongs_to_others, 3))
    CATALOGUE.append(Fault("folders of killed processes", area, "", _staging_is_left, 5))


_register()
