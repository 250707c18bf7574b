"""Measure what it costs that every checkpoint becomes a model, and how the cost grows.

Each model is trained without export, with ``OnnxExport()`` in its modes and with the callbacks
that people write by hand, every fit in a process of its own::

    python benchmarks/lockstep.py [--models cnn,encoder,lstm,big] [--rows none,background,...]
        [--epochs 8] [--epoch-seconds 10] [--growth] [--leak] [--quick] [--merge] [--out DIR]

``--models ""`` runs only ``--growth`` and ``--leak``; ``huge`` and ``wide:<MB>`` are models, too.
The temporary folder (``TMPDIR``) needs room for the checkpoints of one fit.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lockstep_report import HAND_WRITTEN, ROWS, about, part_about, write_results
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# onnxport is imported where it is used: imported here, it would load parts of the exporters
# before the hand-written callbacks need them.

Found = dict[str, Any]

THREADS = 1
"""Of torch in training; a worker has one of its own. See ``benchmarks/baseline.py``."""
EPOCHS = 8
EPOCH_S = 10.0
REPEATS = 7
"""Of primitive costs."""
MIN_STEPS = 4
"""Per epoch: the export before the first checkpoint begins at the third batch."""
WARM_STEPS = 2
POLL_S = 0.05
SEARCH_S = 0.25
"""How often the worker is looked for."""
SETTLED = 2
"""Reports after which a worker only refreshes."""
LIMIT_S = 3 * 3600.0
WAIT_S = 600.0
KEEP_ALL_MB = 100
"""Checkpoints of larger plain models are removed but for two."""
GROWTH_MB = (10, 30, 100, 300, 1200)
GROWTH_EPOCHS = 6
GROWTH_EPOCH_S = 3.0
LEAK_CHECKPOINTS = 200
LEAK_FROM = 10
LEAK_EPOCH_S = 0.5
TINY = "wide:0.01"
SPARED = 2**30
"""Bytes of free memory that stay free when the page cache is filled."""
MOST_FILLED = 64 * 2**30
CHUNK = 2**22
CLASSES = 10
LENGTH = 32
WORKER = b"onnxport.worker.server"


# Models.


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)),
            *(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)),
        )
        around = nn.Conv2d(before, width, 1, stride, bias=False)
        same = stride == 1 and before == width
        self.around = nn.Identity() if same else nn.Sequential(around, nn.BatchNorm2d(width))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features."""
        return torch.relu(self.body(x) + self.around(x))


def cnn(width: int) -> nn.Module:
    """Return a network as ResNet-18."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = [
        part
        for stage, (before, after) in enumerate(pairwise(widths))
        for part in (Block(before, after, 2 if stage else 1), Block(after, after, 1))
    ]
    return nn.Sequential(
        *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8 * width, CLASSES),
    )


class Encoder(nn.Module):
    """A transformer encoder over tokens."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.encoder(self.tokens(x) + self.places).mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM over a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def wide(megabytes: float) -> nn.Module:
    """Return four square layers of this size together."""
    width = max(8, round(math.sqrt(megabytes * 1e6 / 16)))
    square = [part for _ in range(4) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *square, nn.Linear(width, CLASSES))


def floats(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda rows: torch.randn(rows, *shape)


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(1000, (rows, LENGTH))


@dataclass(frozen=True, slots=True)
class Model:
    """A network and how it is trained.

    Args:
        build: Makes it.
        rows: Makes random inputs.
        batch: Batch size.
        plain: SGD without momentum, in place of AdamW.
        keep: As ``save_top_k``.
    """

    build: Callable[[], nn.Module]
    rows: Callable[[int], torch.Tensor]
    batch: int
    plain: bool = False
    keep: int = -1


def plain_model(megabytes: float, keep: int | None = None) -> Model:
    """Return a model of wide layers, with the cheapest training there is."""
    kept = (-1 if megabytes < KEEP_ALL_MB else 2) if keep is None else keep
    return Model(partial(wide, megabytes), floats(64), 4, plain=True, keep=kept)


MODELS = {
    "cnn": Model(partial(cnn, 64), floats(3, 64, 64), 16),
    "encoder": Model(partial(Encoder, 12, 512), tokens, 4),
    "lstm": Model(partial(Recurrent, 1024), floats(LENGTH, 64), 8),
    "big": plain_model(1200, keep=2),
    "huge": plain_model(2400, keep=2),
}
QUICK = {
    "cnn": Model(partial(cnn, 8), floats(3, 64, 64), 16),
    "encoder": Model(partial(Encoder, 2, 64), tokens, 4),
    "lstm": Model(partial(Recurrent, 128), floats(LENGTH, 64), 8),
    "big": plain_model(12, keep=2),
    "huge": plain_model(24, keep=2),
}
DEFAULT = ("cnn", "encoder", "lstm", "big")


def find_model(name: str, *, quick: bool) -> Model:
    """Return a model by name.

    Raises:
        KeyError: If there is none.
    """
    kind, _, size = name.partition(":")
    if kind == "wide":
        return plain_model(float(size))
    return (QUICK if quick else MODELS)[name]


class Trained(pl.LightningModule):
    """Trains a network on random labels."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.net = model.build()
        self.plain = model.plain

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.net(x)
        return logits

    @override
    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        # The newest checkpoints are the best, so that ``save_top_k=2`` keeps these.
        self.log("progress", float(self.global_step), on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        if self.plain:
            return torch.optim.SGD(self.parameters(), lr=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


# In the process of a measurement.


class HandWritten(pl.Callback):
    """The callback that people write by hand, with the batch axis stated by hand, too."""

    def __init__(self, sample: torch.Tensor, *, dynamo: bool) -> None:
        self.sample = sample
        self.dynamo = dynamo
        self.errors: list[str] = []

    def saved(self, module: pl.LightningModule, checkpoint: Path) -> None:
        """Export the live module, and put its modes back."""
        modes = [(part, part.training) for part in module.modules()]
        try:
            export_raw(
                module.eval(), self.sample, checkpoint.with_suffix(".onnx"), dynamo=self.dynamo
            )
        except Exception as error:  # noqa: BLE001 - that it fails is a result
            self.errors.append(f"{type(error).__name__}: {error}"[:400])
        finally:
            for part, mode in modes:
                part.training = mode


def export_raw(module: pl.LightningModule, sample: torch.Tensor, path: Path, dynamo: bool) -> None:
    """Call ``to_onnx`` with a dynamic batch axis."""
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    if dynamo:
        shapes = ({0: "batch"},)
        module.to_onnx(path, sample, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    # TorchScript's exporter has no operator for what eval mode takes instead of attention.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        module.to_onnx(path, sample, dynamo=False, dynamic_axes=axes, **names)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Clock:
    """Times saves: the trainer's as a whole, and the writing that is ModelCheckpoint's own."""

    def __init__(self) -> None:
        self.saves: list[Found] = []
        self.hooks: dict[str, list[float]] = {}
        self._inner = 0.0

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule, callback: Any) -> None:
        """Patch the class that writes, the trainer, and the hooks of the callback."""
        write = TorchCheckpointIO.save_checkpoint

        def timed_write(plugin: Any, *args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            write(plugin, *args, **kwargs)
            self._inner = time.perf_counter() - start

        setattr(TorchCheckpointIO, "save_checkpoint", timed_write)  # noqa: B010 - mypy
        save = trainer.save_checkpoint

        def timed_save(filepath: Any, *args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            save(filepath, *args, **kwargs)
            if isinstance(callback, HandWritten):
                callback.saved(module, Path(filepath))
            total = time.perf_counter() - start
            self.saves.append({"total": total, "inner": self._inner, "file": Path(filepath).name})

        setattr(trainer, "save_checkpoint", timed_save)  # noqa: B010 - mypy
        if callback is None or isinstance(callback, HandWritten):
            return
        for name in ("on_fit_start", "on_train_batch_start", "on_train_epoch_start", "on_fit_end"):
            setattr(callback, name, self._timed(name, getattr(callback, name)))

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        times = self.hooks.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - start)

        return timed


class Said(logging.Handler):
    """Keeps what onnxport warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage()[:400])


class Pace(pl.Callback):
    """Ends training after some seconds, and knows how long a step takes."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.ends: list[float] = []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())
        steps = len(self.ends) - WARM_STEPS
        if steps > 0 and self.ends[-1] - self.ends[WARM_STEPS - 1] > self.limit_s:
            trainer.should_stop = True

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return median(after - before for before, after in pairwise(self.ends[WARM_STEPS - 1 :]))


class Wait(pl.Callback):
    """Lets training wait for each model, so that nothing runs beside the worker, and saves then.

    Args:
        export: The callback whose models are waited for.
        folder: Where the weights are saved.
    """

    def __init__(self, export: Any, folder: Path) -> None:
        self.export = export
        self.folder = folder
        self.saves: list[float] = []

    @override
    def on_train_batch_end(self, *found: Any) -> None:
        """Wait for the export before the first checkpoint, once it has begun."""
        if found[-1] == MIN_STEPS - 1:
            self._wait(lambda: bool(self.export.preflight_reports))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the model of the last checkpoint, then save the weights of it."""
        if trainer.current_epoch:
            self._wait(lambda: len(self.export.reports) >= trainer.current_epoch)
            file = self.folder / f"state-{trainer.current_epoch % 2}.pt"
            state = pl_module.state_dict()
            self.saves.append(timed_into(file, lambda: torch.save(state, file)))

    def _wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not until() and time.monotonic() < end:
            time.sleep(POLL_S)


class Beside(pl.Callback):
    """Lets another process save the same weights beside training, as a worker would.

    Args:
        job: Of this process.
        folder: Where the weights are saved.
    """

    def __init__(self, job: Found, folder: Path) -> None:
        command = [sys.executable, __file__, "--job", json.dumps(job | {"kind": "beside"})]
        self._process = subprocess.Popen(
            [*command, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.saves: list[float] = []

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask for a save, as after a checkpoint."""
        if trainer.current_epoch and self._process.stdin is not None:
            self._process.stdin.write("save\n")
            self._process.stdin.flush()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what it took."""
        self.saves += map(float, self._process.communicate()[0].split())


def save_beside(job: Found, folder: Path) -> Found:
    """Save weights whenever a line comes, and say what it took."""
    os.nice(19)
    _, module = prepare(job)
    state = module.state_dict()
    for count, _ in enumerate(sys.stdin):
        file = folder / f"state-{count % 2}.pt"
        print(timed_into(file, lambda: torch.save(state, file)), flush=True)  # noqa: B023
    return {}


def make_callback(row: str, sample: torch.Tensor) -> Any:
    """Return the callback of a row, or ``None``."""
    if row in {"none", "beside"}:
        return None
    if row in HAND_WRITTEN:
        return HandWritten(sample, dynamo=row == "dynamo")
    from onnxport import OnnxExport

    chosen: dict[str, dict[str, Any]] = {
        "background": {},
        "waiting": {},
        "inline": {"background": False},
        "end": {"when": "end"},
    }
    return OnnxExport(mlflow=False, **chosen[row])


def batches(model: Model, steps: int) -> DataLoader[Any]:
    """Return random data, the same in each process."""
    count = 8 * model.batch
    data = TensorDataset(model.rows(count), torch.randint(CLASSES, (count,)))
    sampler = RandomSampler(data, replacement=True, num_samples=steps * model.batch)
    return DataLoader(data, model.batch, sampler=sampler)


def make_trainer(folder: Path, epochs: int, callbacks: list[Any], *, saves: bool) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def prepare(job: Found) -> tuple[Model, Trained]:
    """Return the model of a job, the same in each process."""
    torch.set_num_threads(job["threads"])
    pl.seed_everything(0, verbose=False)
    warnings.simplefilter("ignore")
    model = find_model(job["model"], quick=job["quick"])
    return model, Trained(model)


def calibrate(job: Found, folder: Path) -> Found:
    """Return how many steps take as long as an epoch should."""
    model, module = prepare(job)
    pace = Pace(min(5.0, job["epoch_s"]))
    make_trainer(folder, 1, [pace], saves=False).fit(module, batches(model, 10**6))
    steps = max(MIN_STEPS, math.ceil(job["epoch_s"] / pace.step_s))
    size = sum(value.nbytes for value in module.state_dict().values())
    return {"step_s": pace.step_s, "steps": steps, "weights": size}


def fit(job: Found, folder: Path) -> Found:
    """Train once."""
    model, module = prepare(job)
    loader = batches(model, job["steps"])
    said, clock = Said(), Clock()
    logging.getLogger("onnxport").addHandler(said)
    start = time.perf_counter()
    callback = make_callback(job["row"], model.rows(model.batch))
    made = time.perf_counter() - start
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", save_top_k=model.keep, monitor="progress", mode="max"
    )
    extra: Wait | Beside | None = None
    if job["row"] == "waiting":
        extra = Wait(callback, folder)
    elif job["row"] == "beside":
        extra = Beside(job, folder)
    callbacks = [checkpoints, *(each for each in (callback, extra) if each is not None)]
    trainer = make_trainer(folder, job["epochs"], callbacks, saves=True)
    clock.attach(trainer, module, callback)
    begun = time.perf_counter()
    trainer.fit(module, loader)
    passed = time.perf_counter() - begun
    peak, written = memory_of(os.getpid())["hwm"], written_by(os.getpid())
    return {
        "fit_s": passed,
        "make_s": made,
        "saves": clock.saves,
        "hooks": {
            name: {"sum": sum(times), "max": max(times, default=0.0)}
            for name, times in clock.hooks.items()
        },
        "reports": [facts_of(report) for report in getattr(callback, "reports", [])],
        "preflight": [facts_of(r) for r in getattr(callback, "preflight_reports", [])],
        "save_s": extra.saves if extra is not None else [],
        "errors": getattr(callback, "errors", []),
        "log": said.lines,
        "trainer_peak": peak,
        "trainer_written": written,
        "models": len([*(folder / "checkpoints").glob("*.onnx")]),
        "checkpoints": len([*(folder / "checkpoints").glob("*.ckpt")]),
        # The same in all rows, if they did the same work.
        "weights_sum": sum(float(p.detach().sum(dtype=torch.float64)) for p in module.parameters()),
    }


def facts_of(report: Any) -> Found:
    """Return what is kept of a report."""
    stages = {key: s for key, s in report.seconds.items() if key not in {"total", "stall"}}
    return {
        "ok": report.ok,
        "how": report.how,
        "core": report.core,
        "epoch": report.epoch,
        "error": report.error,
        "warnings": list(report.warnings),
        "tried": [f"{a.core} {a.variant}: {a.reason}"[:300] for a in report.attempts if not a.ok],
        "checks": len(report.checks),
        "stages": stages,
        "worker_s": sum(stages.values()),
        "total_s": report.seconds.get("total"),
        "stall_s": report.seconds.get("stall"),
    }


def primitives(job: Found, folder: Path) -> Found:
    """Measure what cannot be cheaper: a save, a copy, one raw export; and a worker at rest."""
    _, module = prepare(job)
    state, file, copy = module.state_dict(), folder / "state.pt", folder / "copy.pt"
    saves = [timed_into(file, lambda: torch.save(state, file)) for _ in range(REPEATS)]
    torch.save(state, file)
    copies = [timed_into(copy, lambda: shutil.copyfile(file, copy)) for _ in range(REPEATS)]
    found: Found = {"save_s": saves, "copy_s": copies, "bytes": file.stat().st_size}
    found["worker_idle"] = worker_at_rest()
    if not job["raw"]:
        return found
    sample = find_model(job["model"], quick=job["quick"]).rows(2)
    module.eval()
    raw = []
    for name in ("cold", "warm"):  # the first one imports what an export needs
        path = folder / name / "raw.onnx"
        path.parent.mkdir()
        try:
            raw.append(timed(partial(export_raw, module, sample, path, dynamo=True)))
        except Exception as error:  # noqa: BLE001 - that it fails is a result
            found["raw_error"] = f"{type(error).__name__}: {error}"[:400]
    return found | {"raw_s": raw}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed_into(file: Path, work: Callable[[], object]) -> float:
    """Return how long it takes to write a new file."""
    file.unlink(missing_ok=True)
    return timed(work)


def worker_at_rest() -> dict[str, int]:
    """Return the memory of a worker that has imported what it imports at once."""
    from onnxport import Background
    from onnxport.worker.process import WorkerProcess

    process = WorkerProcess(Background())
    try:
        process.receive(300.0)
        return memory_of(process.pid)
    finally:
        process.close()


# In the process that measures.


def memory_of(pid: int) -> dict[str, int]:
    """Return the memory of a process in bytes; nothing if it is gone."""
    names = {"VmHWM": "hwm", "VmRSS": "rss", "RssAnon": "anon", "RssShmem": "shmem"}
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    fields = (line.partition(":")[::2] for line in text.splitlines())
    return {names[key]: int(value.split()[0]) * 1024 for key, value in fields if key in names}


def written_by(pid: int) -> int:
    """Return what a process has written to disks, in bytes."""
    try:
        text = Path(f"/proc/{pid}/io").read_text(encoding="utf-8")
    except OSError:
        return 0
    fields = dict(line.split(": ") for line in text.splitlines())
    return int(fields["write_bytes"])


def memory_files_of(pid: int) -> int:
    """Return the size of the memory files that a process holds: copies of weights on their way."""
    size = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if "memfd:onnxport" in str(Path(entry.path).readlink()):
                    size += os.stat(entry.path).st_blocks * 512  # noqa: PTH116 - a link to memory
    return size


def workers_of(trainer: int) -> Iterator[int]:
    """Yield the workers of a process."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path(entry.path, "stat").read_text(encoding="utf-8")
            mine = int(stat.rpartition(")")[2].split()[1]) == trainer
            if mine and WORKER in Path(entry.path, "cmdline").read_bytes():
                yield int(entry.name)


class Watch(threading.Thread):
    """Watches the memory of a trainer and its worker.

    Args:
        trainer: The process.
        folder: Where reports appear.
    """

    def __init__(self, trainer: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.folder = folder
        self.points: list[Found] = []
        self.written: dict[int, int] = {}
        self._reports: set[str] = set()
        self._saved: set[str] = set()
        self._over = threading.Event()
        self._worker: int | None = None
        self._looked = 0.0
        self._settled: set[int] = set()

    @override
    def run(self) -> None:
        """Take a point every 50 ms."""
        while not self._over.wait(POLL_S):
            self._look()

    def finish(self) -> None:
        """End."""
        self._over.set()
        self.join()

    def _look(self) -> None:
        with contextlib.suppress(OSError):
            names = os.listdir(self.folder)  # noqa: PTH208 - twenty times a second
            self._reports.update(name for name in names if name.endswith(".onnx.json"))
            self._saved.update(name for name in names if name.endswith(".ckpt"))
        point: Found = {"reports": len(self._reports), "saved": len(self._saved)}
        point |= {"trainer": memory_of(self.trainer), "copies": memory_files_of(self.trainer)}
        now = time.monotonic()
        if self._worker is None and now - self._looked > SEARCH_S:
            self._looked, self._worker = now, next(workers_of(self.trainer), None)
        if self._worker is not None:
            memory = memory_of(self._worker)
            if "rss" in memory:
                point["worker"] = memory | {"settled": self._worker in self._settled}
                self.written[self._worker] = written_by(self._worker)
                self._settle(self._worker)
            else:  # gone, or a zombie
                self._worker = None
        self.points.append(point)

    def _settle(self, worker: int) -> None:
        """From the second report on, count the worker's peak anew."""
        if len(self._reports) >= SETTLED and worker not in self._settled:
            with contextlib.suppress(OSError):
                Path(f"/proc/{worker}/clear_refs").write_text("5", encoding="utf-8")
                self._settled.add(worker)

    def summary(self) -> Found:
        """Return peaks, in bytes."""
        busy = [point["worker"] for point in self.points if "worker" in point]
        late = [p["worker"] for p in self.points if "worker" in p and p["reports"] >= SETTLED]
        first = [p["worker"] for p in self.points if "worker" in p and not p["reports"]]
        whole = [p["trainer"]["rss"] + p["copies"] for p in self.points if "rss" in p["trainer"]]
        return {
            "trainer_with_copies": max(whole, default=0),
            "copies": max((point["copies"] for point in self.points), default=0),
            "workers": len(self.written),
            "worker_written": sum(self.written.values()),
            "worker_at_export": peaks(first),
            "worker_at_refresh": peaks(late),
            "worker_at_rest": {
                "own": min((own(point) for point in late), default=None),
                "rss": min((point["rss"] for point in late), default=None),
            },
            "points": len(busy),
        }

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Return median memory, in bytes, while there were so many checkpoints, or reports."""
        groups: dict[str, dict[int, list[int]]] = {"trainer": {}, "worker": {}}
        for point in self.points:
            for who, count in (("trainer", point["saved"]), ("worker", point["reports"])):
                if "anon" in point.get(who, {}):
                    groups[who].setdefault(count, []).append(point[who]["anon"])
        return {
            who: [(count, median(known)) for count, known in sorted(found.items())]
            for who, found in groups.items()
        }


def own(point: Found) -> int:
    """Return memory that is no page of a file."""
    return int(point["anon"] + point["shmem"])


def peaks(points: list[Found]) -> Found:
    """Return peaks; the kernel's own mark counts from where it was set anew."""
    marks = [point["hwm"] for point in points if point["settled"]]
    return {
        "own": max((own(point) for point in points), default=None),
        "rss": max([*marks, *(point["rss"] for point in points)], default=None),
    }


class PageCache:
    """Fills the page cache, so that what is measured gets memory that was in use just before.

    So it is on any machine that has run for a while. On a virtual one, free memory may be lent
    back to the host, and then the first to use it again pays seconds per gigabyte.
    """

    def __init__(self) -> None:
        self._file = Path(tempfile.gettempdir(), f"onnxport-lockstep-{os.getpid()}.fill")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - SPARED
        room = shutil.disk_usage(self._file.parent).free // 2
        self._size = free if free < min(room, MOST_FILLED) else 0
        self.fills = self._size > 0
        atexit.register(lambda: self._file.unlink(missing_ok=True))

    def fill(self) -> None:
        """Write the file, or read it again."""
        if self._size and not self._file.exists():
            chunk = bytes(CHUNK)
            with self._file.open("wb", buffering=0) as file:
                while file.tell() < self._size:
                    file.write(chunk)
        os.sync()  # what earlier jobs have written is not paid for by later ones
        if self._size:
            room = bytearray(CHUNK)
            with self._file.open("rb", buffering=0) as file:
                while file.readinto(room):
                    pass


def run_apart(job: Found) -> tuple[Found, Watch]:
    """Run a job in a new process, with an empty folder of its own; an error is a result."""
    with tempfile.TemporaryDirectory(prefix="onnxport-lockstep-") as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--job", json.dumps(job), name]
        environment = os.environ | {"ONNXPORT_CACHE_DIR": f"{name}/cache"}
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            watch = Watch(process.pid, folder / "checkpoints")
            watch.start()
            try:
                code: int | str = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                code = "time limit"
            finally:
                process.kill()
                process.wait()
                watch.finish()
        if code != 0:
            text = (folder / "said").read_text(encoding="utf-8", errors="replace")[-1500:]
            return {"failed": f"{code}: {text}"}, watch
        found: Found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return found, watch


class Bench:
    """One run of this program.

    Args:
        options: From the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: Found = {"models": {}, "growth": None, "leak": None}
        file = options.out / "lockstep.json"
        if options.merge and file.exists():
            earlier = json.loads(file.read_text(encoding="utf-8"))
            self.results = {key: earlier[key] for key in self.results}
        names = ("epochs", "epoch_s", "threads", "quick")
        self.results["settings"] = {name: getattr(options, name) for name in names}
        self._loaded: Found | None = None
        self._cache = PageCache()
        self.results["settings"]["filled"] = self._cache.fills

    def run(self) -> None:
        """Measure everything that was asked for."""
        for name in self.options.models:
            part = self._model(name)
            if part is not None:
                self.results["models"][name] = part
                self._write()
        if self.options.growth:
            self.results["growth"] = self._growth()
            self._write()
        if self.options.leak:
            self.results["leak"] = self._leak()
            self._write()

    def _write(self) -> None:
        self.results["about"] = about()
        write_results(self.options.out, self.results)

    def _job(self, kind: str, model: str, **more: Any) -> tuple[Found, Watch]:
        options = self.options
        self._cache.fill()
        base = {"kind": kind, "model": model, "threads": options.threads, "quick": options.quick}
        found, watch = run_apart(base | {"epochs": options.epochs} | more)
        said = f"{found['fit_s']:.1f} s" if "fit_s" in found else ""
        if "failed" in found:
            said = f"FAILED: {found['failed'][-400:]}"
        print(f"{model:10} {more.get('row', kind):12} {said}", flush=True)
        return found, watch

    def _fit(self, model: str, row: str, steps: int, **more: Any) -> tuple[Found, Watch]:
        found, watch = self._job("fit", model, row=row, steps=steps, **more)
        if "failed" in found:
            return found, watch
        return found | watch.summary(), watch

    def _worker(self) -> Found | None:
        """Return the memory of a worker that made models of nearly no weights: imports alone."""
        if self._loaded is None:
            more = {"epoch_s": 2.0, "epochs": 6}
            paced, _ = self._job("calibrate", TINY, **more)
            found, _ = self._fit(TINY, "background", paced.get("steps", MIN_STEPS), **more)
            self._loaded = found.get("worker_at_rest")
        return self._loaded

    def _model(self, name: str) -> Found | None:
        paced, _ = self._job("calibrate", name, epoch_s=self.options.epoch_s)
        if "failed" in paced:
            return None
        part = paced | {"about": part_about(), "rows": {}}
        part["primitives"], _ = self._job("primitives", name, raw=True)
        part["primitives"]["worker_loaded"] = self._worker()
        for row in self.options.rows:
            part["rows"][row], _ = self._fit(name, row, paced["steps"])
        return part

    def _growth(self) -> Found:
        quick = self.options.quick
        sizes = GROWTH_MB if not quick else [size / 10 for size in GROWTH_MB[:-1]]
        seconds = GROWTH_EPOCH_S / 3 if quick else GROWTH_EPOCH_S
        points = []
        for size in sizes:
            name = f"wide:{size:g}"
            paced, _ = self._job("calibrate", name, epoch_s=seconds)
            costs, _ = self._job("primitives", name, raw=False)
            costs["worker_loaded"] = self._worker()
            if "failed" in paced or "failed" in costs:
                continue
            found, _ = self._fit(name, "background", paced["steps"], epochs=GROWTH_EPOCHS)
            points.append(paced | {"primitives": costs, "row": found})
        return {"about": part_about(), "points": points}

    def _leak(self) -> Found:
        count = LEAK_CHECKPOINTS // 10 if self.options.quick else LEAK_CHECKPOINTS
        name = "wide:1"
        paced, _ = self._job("calibrate", name, epoch_s=LEAK_EPOCH_S)
        found: Found = {"about": part_about(), "checkpoints": count, "from": LEAK_FROM, "rows": {}}
        for row in ("none", "background"):
            fitted, watch = self._fit(name, row, paced["steps"], epochs=count)
            found["rows"][row] = fitted | {"series": watch.series()}
        return found


JOBS: dict[str, Callable[[Found, Path], Found]] = {
    "beside": save_beside,
    "calibrate": calibrate,
    "fit": fit,
    "primitives": primitives,
}


def read_names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def read_rows(text: str) -> list[str]:
    """Read rows, which come in the order of the table.

    Raises:
        ArgumentTypeError: If there is no such row.
    """
    names = read_names(text)
    wrong = set(names) - set(ROWS)
    if wrong:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(sorted(wrong))}")
    return [row for row in ROWS if row in names]


def read_models(text: str) -> list[str]:
    """Read models.

    Raises:
        ArgumentTypeError: If there is no such model.
    """
    for name in (names := read_names(text)):
        try:
            find_model(name, quick=False)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"no such model: {name}") from None
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=read_models, default=list(DEFAULT))
    parser.add_argument("--rows", type=read_rows, default=list(ROWS), help="with commas")
    parser.add_argument("--epochs", type=int, help=f"and checkpoints per fit; default {EPOCHS}")
    parser.add_argument(
        "--epoch-seconds", dest="epoch_s", type=float, help=f"of training; default {EPOCH_S:g}"
    )
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch in training")
    parser.add_argument("--growth", action="store_true", help="cost by size of the weights")
    parser.add_argument("--leak", action="store_true", help="memory over many checkpoints")
    parser.add_argument("--quick", action="store_true", help="tiny models, short epochs")
    parser.add_argument("--merge", action="store_true", help="keep other parts of the last run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs is None:
        options.epochs = 4 if options.quick else EPOCHS
    if options.epoch_s is None:
        options.epoch_s = 2.0 if options.quick else EPOCH_S
    return options


def main() -> None:
    options = parse()
    if options.job is None:
        Bench(options).run()
        return
    job, folder = json.loads(options.job[0]), Path(options.job[1])
    found = JOBS[job["kind"]](job, folder)
    if found:
        (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
