"""A training to do harm to, and what must be true of a folder afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import onnx
import onnxruntime as ort
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from onnxport import weights_sha256
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from onnxport import ExportReport, OnnxExport

ROWS, BATCH, EVERY = 64, 8, 2
"""Rows, rows per step, and steps per checkpoint."""


class Net(pl.LightningModule):
    """A small network whose losses tell if a random number or a bit of a weight is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(32, 4)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


@dataclass
class Run:
    """What became of a training.

    Args:
        losses: Of each step.
        reports: Of the callback.
        error: What ended it, if it was not the end.
    """

    losses: list[float]
    reports: list[ExportReport] = field(default_factory=list)
    error: BaseException | None = None


def train(
    checkpoints: Path,
    export: OnnxExport | None = None,
    *callbacks: Any,
    steps: int = 8,
    make: Callable[[], Any] = Net,
    **options: Any,
) -> Run:
    """Train with a checkpoint every two steps, of which the last two and ``last`` are kept.

    Args:
        checkpoints: Where they go.
        export: The callback that is tried; ``None``: the same without it.
        callbacks: More of them, called before it.
        steps: How many.
        make: Makes the module.
        options: More for the trainer.
    """
    pl.seed_everything(7, verbose=False)
    rows = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(3))
    torch.set_default_dtype(torch.float32)  # some modules that are judged change it
    module = make()
    keep = ModelCheckpoint(
        checkpoints,
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=EVERY,
        save_last=True,
    )
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[keep, *callbacks, *([] if export is None else [export])],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=checkpoints,
        **{"logger": False, **options},
    )
    run = Run(module.losses)
    try:
        data = torch.utils.data.TensorDataset(rows)
        trainer.fit(module, torch.utils.data.DataLoader(data, BATCH))
    except BaseException as error:  # noqa: BLE001 - Ctrl-C is one of the faults
        run.error = error
    run.reports = [] if export is None else list(export.reports)
    return run


@cache
def undisturbed(steps: int) -> tuple[float, ...]:
    """Return the losses of the training when there is no callback."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return tuple(train(Path(folder), steps=steps).losses)


# --- what must be true --------------------------------------------------------------------------


def wrong_models(models: Path, checkpoints: Path, make: Callable[[], Any] = Net) -> list[str]:
    """Return what is wrong with files that have the name of a model; at any time nothing may be.

    Args:
        models: Folder of models.
        checkpoints: Folder of checkpoints.
        make: Makes the module.
    """
    found = []
    for path in sorted(models.glob("*.onnx")):
        checkpoint = checkpoints / f"{path.stem}.ckpt"
        content = checkpoint.read_bytes() if checkpoint.is_file() else None
        problem = _wrong_model(path, content, make)
        found += [f"{path.name} {problem}"] if problem else []
    return found


_judged: dict[str, str] = {}


def _wrong_model(path: Path, checkpoint: bytes | None, make: Callable[[], Any]) -> str:
    """Judge each pair of files once: replayed folders have mostly the same ones."""
    try:
        whole = path.read_bytes() + repr(checkpoint).encode()
    except OSError as error:
        return f"cannot be read: {error}"
    key = hashlib.sha256(whole).hexdigest()
    if key not in _judged:
        _judged[key] = _judge(path, checkpoint, make)
    return _judged[key]


def _judge(path: Path, checkpoint: bytes | None, make: Callable[[], Any]) -> str:
    try:
        onnx.checker.check_model(onnx.load(path))
        session = ort.InferenceSession(path)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the file
        return f"does not load: {error}"
    if checkpoint is None:
        return "has no checkpoint"
    try:
        state = torch.load(BytesIO(checkpoint), weights_only=False)["state_dict"]
    except Exception:  # noqa: BLE001 - Lightning does not sync what it writes
        return ""
    if read_metadata(path).get("weights_sha256") != weights_sha256(state):
        return "holds other weights than its checkpoint"
    torch.set_default_dtype(torch.float32)  # some modules that are judged change it
    module = make()
    module.load_state_dict(state)
    rows = torch.randn(3, 16, dtype=torch.float32)
    with torch.no_grad():
        expected = module.eval()(rows)
    actual = torch.from_numpy(session.run(None, {"x": rows.numpy()})[0])
    close = torch.allclose(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    return "" if close else "computes something else"


def left_behind(folder: Path) -> list[str]:
    """Return temporary files of ours; after the next start there may be none."""
    return sorted(
        f"{path.relative_to(folder)} is left"
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.suffix in {".tmp", ".twin"}
        if not path.name.startswith(".fuse_hidden")
    )


def missing(models: Path, checkpoints: Path) -> list[str]:
    """Return which checkpoint has no model, and which model no checkpoint."""
    names = {path.stem for path in checkpoints.glob("*.ckpt")}
    made = {path.stem for path in models.glob("*.onnx")}
    return [f"{name}: checkpoint without model" for name in sorted(names - made)] + [
        f"{name}: model without checkpoint" for name in sorted(made - names)
    ]


def false_reports(models: Path, reports: Sequence[ExportReport] = ()) -> list[str]:
    """Return reports that claim what is not so."""
    last = {report.path: report for report in reports if report.ok}
    found = []
    for path in models.glob("*.onnx.json"):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            found.append(f"{path.name} is no report: {error}")
            continue
        model = path.with_name(path.name.removesuffix(".json"))
        if content["ok"] != model.exists():
            found.append(
                f"{path.name} says ok={content['ok']}, and model.exists()={model.exists()}"
            )
        if content["ok"] and str(model) in last:
            digest = last[str(model)].weights_sha256
            if digest != content["weights_sha256"]:
                found.append(f"{path.name} is of other weights than the callback's report")
    return found


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do something in a thread, which is told when what is done here is over."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def workers_of(pid: int = 0) -> list[int]:
    """Return the processes of ours that a process (default: this one) has started and that run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if b"onnxport." in words and int(state[1]) == (pid or os.getpid()) and state[0] != "Z":
            found.append(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended may wait for a moment to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
