"""Train for hours with a checkpoint every few seconds, and let everything go wrong meanwhile.

    python benchmarks/soak.py [--hours H] [--every S] [--fault-every S] [--seed S]

``make soak`` trains for two hours on a disk that fails now and then, beside a real MLflow server
that is killed and started again. Workers are killed and stopped, files of ours are damaged. Each
model that appears is held against its checkpoint while both are there. At the end training must
have computed the same as without the callback, and the next start must put everything right.

Writes ``benchmarks/results/soak.json`` and ``soak.md``.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import lightning.pytorch as pl  # noqa: E402 - what is ours is found by the line above
import torch  # noqa: E402
from faults.disk import Rule, mounted  # noqa: E402
from faults.ground import (  # noqa: E402
    false_reports,
    is_running,
    left_behind,
    missing,
    workers_of,
    wrong_models,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lockstep_report import about, part_about  # noqa: E402
from servers import free_port, mlflow_server  # noqa: E402
from soak_report import MEASURED, flat, page  # noqa: E402
from torch import nn  # noqa: E402

from onnxport import Background, MLflow, OnnxExport  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.disk import Mounted

RESULTS = ROOT / "benchmarks" / "results"
STEPS = 10
"""Per checkpoint."""
MORE_STEPS = 3 * STEPS
"""Of the next start."""
END_LIMIT_S = 300.0
OURS = "*.onnx*"
"""What is asked of the disk with such a path may fail; checkpoints themselves are Lightning's."""
LASTING = ("mkdir", "create", "write", "sync", "read")
"""What fails for seconds. A disk that does not let names go for long keeps older models that long,
which is promised, and tried in ``tests/faults/test_refused.py``."""


# --- the training -------------------------------------------------------------------------------


class Net(pl.LightningModule):
    """A megabyte of weights, dropout, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(16, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 512)
        )
        self.head = nn.Linear(512, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return four scores for each row of 16 numbers."""
        return self.head(torch.relu(self.body(x)))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 1e-2)


class Paced(Callback):
    """Makes steps as long as they should be, and takes a digest of their losses.

    Args:
        step_s: Seconds per step.
        stop: Training ends once there is such a file.
    """

    def __init__(self, step_s: float, stop: Path) -> None:
        self.step_s, self.stop = step_s, stop
        self.losses = sha256()
        self.longest_s = 0.0
        self._at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, _: Any, outputs: Any, *__: Any) -> None:
        """Wait, and stop if it is time."""
        self.losses.update(struct.pack("<d", outputs["loss"].item()))
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self._at)
        time.sleep(self.step_s)
        self._at = time.monotonic()
        # Only where a checkpoint has just been written: the end then has no more to save.
        if trainer.global_step % STEPS == 0:
            trainer.should_stop = self.stop.exists()


def train(folder: Path, step_s: float, steps: int, uri: str) -> dict[str, Any]:
    """Train until a file says stop, or for so many steps; ``uri``: with the callback, and there."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("onnxport").setLevel(logging.INFO)
    pl.seed_everything(7, verbose=False)
    rows = torch.randn(4096, 16, generator=torch.Generator().manual_seed(3))
    kinds = (rows.abs().argmax(1) % 4).long()
    paced = Paced(step_s, folder / "stop")
    keep = ModelCheckpoint(
        folder / "disk" / "c",
        monitor="loss",
        save_top_k=3,
        every_n_train_steps=STEPS,
        save_last=True,
    )
    callbacks: list[Callback] = [paced]
    export = None
    if uri:
        tracked = MLflow(tracking_uri=uri, register="soak")
        export = OnnxExport(core="trace", mlflow=tracked, background=Background(drain_s=60.0))
        callbacks += [keep, export]
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(uri),
        logger=False,
        accelerator="cpu",
        log_every_n_steps=1,
        default_root_dir=folder / "root",
    )
    data = torch.utils.data.TensorDataset(rows, kinds)
    trainer.fit(Net(), torch.utils.data.DataLoader(data, 32, shuffle=True))
    reports = [] if export is None else export.reports
    return {
        "steps": trainer.global_step,
        "losses": paced.losses.hexdigest(),
        "longest_step_s": round(paced.longest_s, 3),
        "models": sum(report.ok for report in reports),
        "failed": dict(Counter(report.code or "none" for report in reports if not report.ok)),
        "errors": {report.code or "none": report.error for report in reports if not report.ok},
        "untold": sum(bool(r.tracking and r.tracking.missing) for r in reports),
    }


def trained(folder: Path, *, step_s: float = 0.0, steps: int = -1, uri: str = "") -> list[str]:
    """Return the command that trains in a process of its own."""
    command = [sys.executable, __file__, "--train", str(folder), "--step-s", str(step_s)]
    return [*command, "--steps", str(steps), "--uri", uri]


def result_of(command: list[str], log: Path) -> dict[str, Any]:
    """Run such a command to its end; return what it found."""
    with log.open("a") as output:
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=output, text=True)
    return dict(json.loads(run.stdout.splitlines()[-1]))


# --- what goes wrong ----------------------------------------------------------------------------


class Server:
    """A real MLflow server at one address, that is ended and started again.

    Args:
        folder: Where it keeps what it has.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._port, self._running = folder, free_port(), ExitStack()
        self.start()
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it."""
        store = f"sqlite:///{self._folder}/mlflow.db"
        self._running.enter_context(mlflow_server(store, self._folder, port=self._port))

    def end(self) -> None:
        """End it."""
        self._running.close()

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        asked = f"--port\0{self._port}\0".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if asked in (entry / "cmdline").read_bytes():
                    os.killpg(os.getpgid(int(entry.name)), number)
                    return


@dataclass
class Harm:
    """Does one thing after the other to a training.

    Args:
        trainer: Its process.
        disk: Where its checkpoints and models are.
        server: What it speaks to.
        random: Decides.
    """

    trainer: int
    disk: Mounted
    server: Server
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def next(self) -> None:
        """Do something."""
        name, harm = self.random.choice(list(self.all().items()))
        if harm():
            self.done[name] += 1
            with (self.disk.folder.parent / "harm.log").open("a") as log:
                log.write(f"{datetime.now(UTC):%H:%M:%S} {name}\n")

    def settle(self, *, all_of_it: bool = False) -> None:
        """Undo what has lasted long enough."""
        due = [each for each in self.later if all_of_it or each[0] <= time.monotonic()]
        self.later = [each for each in self.later if each not in due]
        for _, undo in due:
            undo()

    def all(self) -> dict[str, Callable[[], bool]]:
        """Return what can be done."""
        return {
            "a worker or courier gets SIGKILL": partial(self._signal_worker, signal.SIGKILL),
            "a worker or courier gets SIGSEGV": partial(self._signal_worker, signal.SIGSEGV),
            "a worker or courier stands still": self._stop_worker,
            "training stands still": self._stop_trainer,
            "the disk is full": partial(self._disk, errno.ENOSPC),
            "the disk has errors": partial(self._disk, errno.EIO),
            "nobody may write to the disk": partial(self._disk, errno.EACCES),
            "the disk fails once": partial(self._disk, errno.EIO, once=True),
            "the disk is slow": self._slow,
            "the server is ended": self._end_server,
            "the server hangs": self._hang_server,
            "a file of ours is damaged": self._damage,
            "a folder of ours is removed": self._remove,
        }

    def _undo(self, most_s: float, undo: Callable[[], None]) -> bool:
        self.later.append((time.monotonic() + self.random.uniform(1.0, most_s), undo))
        return True

    def _signal_worker(self, number: int) -> bool:
        for worker in self.random.sample(workers := workers_of(self.trainer), min(1, len(workers))):
            os.kill(worker, number)
            return True
        return False

    def _stop_worker(self) -> bool:
        for worker in self.random.sample(workers := workers_of(self.trainer), min(1, len(workers))):
            os.kill(worker, signal.SIGSTOP)
            return self._undo(15.0, partial(_go_on, worker))
        return False

    def _stop_trainer(self) -> bool:
        os.kill(self.trainer, signal.SIGSTOP)
        return self._undo(3.0, partial(_go_on, self.trainer))

    def _disk(self, error: int, *, once: bool = False) -> bool:
        rule = Rule(
            operations=() if once else LASTING,
            match=OURS,
            error=error,
            times=1 if once else -1,
            after=self.random.randrange(30),
        )
        self.disk.fail(rule)
        return self._undo(10.0, self.disk.fail)

    def _slow(self) -> bool:
        self.disk.fail(Rule(match=OURS, error=0, wait_s=0.1, times=-1))
        return self._undo(10.0, self.disk.fail)

    def _end_server(self) -> bool:
        self.server.end()
        return self._undo(30.0, self.server.start)

    def _hang_server(self) -> bool:
        self.server.signal(signal.SIGSTOP)
        return self._undo(30.0, partial(self.server.signal, signal.SIGCONT))

    def _damage(self) -> bool:
        kept = self.disk.kept / "c"
        files = [*kept.glob(".*.pending"), *kept.glob(".*template"), *kept.glob(".*.tracking")]
        if not files:
            return False
        with suppress(OSError):
            file = self.random.choice(sorted(files))
            content = file.read_bytes()
            file.write_bytes(content[: self.random.randrange(len(content) + 1)])
        return True

    def _remove(self) -> bool:
        folders = sorted(self.disk.kept.glob("c/.onnxport-*"))
        for folder in folders[:1]:
            shutil.rmtree(folder, ignore_errors=True)
        return bool(folders)


def _go_on(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


# --- what is looked at --------------------------------------------------------------------------


@dataclass
class Judge:
    """Holds each model against its checkpoint, while both are there.

    Args:
        kept: The folder of both, without the faults of the disk.
        room: For copies.
    """

    kept: Path
    room: Path
    wrong: list[str] = field(default_factory=list)
    seen: set[tuple[Any, ...]] = field(default_factory=set)

    def look(self) -> None:
        """Judge what has not been judged."""
        for model in self.kept.glob("*.onnx"):
            checkpoint = model.with_suffix(".ckpt")
            with suppress(FileNotFoundError):
                key = (_identity(model), _identity(checkpoint))
                if key in self.seen:
                    continue
                contents = model.read_bytes(), checkpoint.read_bytes()
                if key != (_identity(model), _identity(checkpoint)):
                    continue  # it has changed meanwhile: what was read belongs to no moment
                self.seen.add(key)
                self._judge(model.name, *contents)

    def _judge(self, name: str, model: bytes, checkpoint: bytes) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()
        (self.room / name).write_bytes(model)
        (self.room / name).with_suffix(".ckpt").write_bytes(checkpoint)
        now = datetime.now(UTC).strftime("%H:%M:%S")
        self.wrong += [f"{now} {text}" for text in wrong_models(self.room, self.room, Net)]


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def figures(trainer: int, kept: Path) -> dict[str, int]:
    """Return memory, descriptors and threads of a training and of its processes."""
    workers = workers_of(trainer)
    found = {f"trainer_{name}": value for name, value in _figures(trainer).items()}
    for name in ("kib", "descriptors", "threads"):
        found[f"workers_{name}"] = sum(_figures(worker).get(name, 0) for worker in workers)
    found["workers"] = len(workers)
    found["files"] = sum(1 for _ in kept.rglob("*"))
    found["shared"] = _shared_memory({trainer, *workers})
    return found


def _figures(process: int) -> dict[str, int]:
    with suppress(OSError):
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
        )
        return {
            "kib": int(status["RssAnon"].split()[0]),
            "descriptors": sum(1 for _ in Path(f"/proc/{process}/fd").iterdir()),
            "threads": int(status["Threads"]),
        }
    return {}


def _shared_memory(processes: set[int]) -> int:
    """Count what these processes hold of shared memory, with a name or without one."""
    held = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                _, _, _, _, inode, *name = line.split(maxsplit=5)
                if name and name[0].startswith(("/dev/shm/", "/memfd:")):  # noqa: S108
                    held.add(inode)
    return len(held)


# --- the whole ----------------------------------------------------------------------------------


def soaked(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, harm and look; return what was found."""
    rng = random.Random(arguments.seed)  # noqa: S311 - not a secret
    with mounted(folder, recorded=False) as disk:
        server = Server(folder / "server")
        command = trained(folder, step_s=arguments.every / STEPS, uri=server.uri)
        with (folder / "train.log").open("w") as log:
            trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        harm = Harm(trainer.pid, disk, server, rng)
        judge = Judge(disk.kept / "c", folder / "room")
        series = _watch(trainer, harm, judge, arguments)
        harm.settle(all_of_it=True)
        (folder / "stop").touch()
        workers = workers_of(trainer.pid)
        said, _ = trainer.communicate(timeout=END_LIMIT_S)
        judge.look()
        found = {"training": json.loads(said.splitlines()[-1])} if not trainer.returncode else {}
        found |= {
            "ended": trainer.returncode,
            "orphans": sum(map(is_running, workers)),
            "faults": dict(sorted(harm.done.items())),
            "judged": len(judge.seen),
            "wrong": judge.wrong,
            "series": series,
        }
        if found["ended"] == 0:
            log = folder / "after.log"
            steps = found["training"]["steps"]
            found["undisturbed"] = result_of(trained(folder / "alone", steps=steps), log)
            (folder / "stop").unlink()
            again = trained(folder, steps=MORE_STEPS, uri=server.uri)
            found["next_start"] = result_of(again, log)
            kept = disk.kept / "c"
            found["not_put_right"] = [
                *wrong_models(kept, kept, Net),
                *false_reports(disk.folder / "c"),
                *missing(kept, kept),
                *left_behind(kept),
            ]
        server.end()
    return found


def _watch(
    trainer: subprocess.Popen[str], harm: Harm, judge: Judge, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    start = time.monotonic()
    series: list[dict[str, Any]] = []
    harmed_at = start + 60.0  # it may start in peace
    while (seconds := time.monotonic() - start) < arguments.hours * 3600:
        if trainer.poll() is not None:
            break
        harm.settle()
        if time.monotonic() >= harmed_at and not harm.later:
            harm.next()
            harmed_at = time.monotonic() + harm.random.expovariate(1 / arguments.fault_every)
        judge.look()
        if seconds >= len(series) * arguments.look_every:
            series.append({"s": round(seconds), **figures(trainer.pid, judge.kept)})
            if len(series) % 30 == 0:
                print(
                    f"{seconds:.0f} s, {len(judge.seen)} models, {harm.done.total()} faults, "
                    f"{len(judge.wrong)} wrong, {series[-1]}",
                    flush=True,
                )
        time.sleep(0.2)
    return series


def main() -> None:
    """Run and write the results.

    Raises:
        SystemExit: If training has ended by itself.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds per checkpoint")
    parser.add_argument("--fault-every", type=float, default=15.0, help="seconds, on average")
    parser.add_argument("--look-every", type=float, default=10.0, help="seconds per row of figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step-s", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--uri", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        found = train(arguments.train, arguments.step_s, arguments.steps, arguments.uri)
        print(json.dumps(found))
        return
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    found = about() | part_about() | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
    found |= {name: getattr(arguments, name) for name in ("hours", "every", "fault_every", "seed")}
    found |= soaked(folder, arguments)
    found["flat"] = {name: flat(found["series"], name) for name in MEASURED}
    arguments.results.mkdir(exist_ok=True)
    (arguments.results / "soak.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    if found["ended"] != 0:
        raise SystemExit(f"training ended with {found['ended']}: {folder}/train.log")
    (arguments.results / "soak.md").write_text(page(found), encoding="utf-8")
    print(page(found))
    if found["wrong"] or found["not_put_right"]:
        print(*found["wrong"], *found["not_put_right"], f"See {folder}.", sep="\n")
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
