"""Kill the trainer and the worker at random moments, and look at what is left.

    python benchmarks/kills.py [--tries 100] [--only trainer|worker]

After each kill of the trainer: no process of it may be left, and every file that has a model's name
must be a whole model with the weights of its checkpoint; so must those that are then made without
the module (``onnxport.resume``). Every tenth time training is started again in the same folder:
then each checkpoint must have its model, and nothing else may lie about. The
worker is killed again and again during one long training, which must not notice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import onnxruntime as ort
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lockstep_report import about
from torch import nn

from onnxport import Background, OnnxExport, resume, weights_sha256
from onnxport.exporter.ownership import read_metadata
from onnxport.worker.client import worker_for

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faults.ground import is_running, workers_of

RESULTS = Path(__file__).parent / "results"
OPTIONS = Background(drain_s=300)
ROUND = 10
"""After so many kills training is started again and may finish."""


class Net(pl.LightningModule):
    """A small network that takes a moment per step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 4)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, 4) for (N, 64)."""
        return self.head(self.net(x))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Take a moment."""
        time.sleep(0.02)
        loss = self(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one with state, so that checkpoints are larger than weights."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Killer(Callback):
    """Kills the worker at random moments, so many times."""

    def __init__(self, tries: int) -> None:
        self.left, self.killed = tries, 0
        self.random = random.Random(0)  # noqa: S311
        self.next = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Kill, if it is time."""
        if time.monotonic() >= self.next:
            pid = worker_for(OPTIONS, 0).pid
            if self.left and pid is not None and self.next:
                os.kill(pid, signal.SIGKILL)
                self.left, self.killed = self.left - 1, self.killed + 1
            # From the import of torch to the middle of an export.
            self.next = time.monotonic() + self.random.uniform(0.5, 9.0)
        trainer.should_stop = self.left == 0


def train(folder: Path, epochs: int, *others: Callback, export: OnnxExport | None = None) -> Net:
    """Train with a checkpoint every ten steps, of which the last two are kept."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(160, 64))
    module = Net()
    keep = ModelCheckpoint(
        folder, monitor="step", mode="max", save_top_k=2, every_n_train_steps=10, save_last=True
    )
    callbacks = [keep, *others, *([] if export is None else [export])]
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 8))
    return module


def faults(folder: Path, *, finished: bool) -> list[str]:
    """Return what is wrong in a folder."""
    found: list[str] = []
    for path in folder.glob("*.onnx"):
        checkpoint = path.with_suffix(".ckpt")
        try:
            session = ort.InferenceSession(path)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the file
            found.append(f"{path.name} does not load: {error}")
            continue
        if not checkpoint.exists():
            if finished:
                found.append(f"{path.name} has no checkpoint")
            continue
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        if read_metadata(path).get("weights_sha256") != weights_sha256(state):
            # The trainer may have died between a checkpoint and the model that replaces this one.
            if finished:
                found.append(f"{path.name} holds other weights than its checkpoint")
            continue
        module = Net()
        module.load_state_dict(state)
        rows = torch.randn(3, 64)
        with torch.no_grad():
            expected = module.eval()(rows)
        actual = torch.from_numpy(session.run(None, {"x": rows.numpy()})[0])
        if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-5):
            found.append(f"{path.name} computes something else")
    if finished:
        checkpoints = {path.stem for path in folder.glob("*.ckpt")}
        models = {path.stem for path in folder.glob("*.onnx")}
        if checkpoints != models:
            found.append(f"checkpoints and models differ: {sorted(checkpoints ^ models)}")
        found += [f"{path.name} is left" for path in folder.glob(".*")]
    return found


def kill_trainers(tries: int) -> dict[str, object]:
    """Start trainings and kill each at a random moment."""
    chance = random.Random(1)  # noqa: S311
    problems: list[str] = []
    orphans = models = resumed = owed = 0
    with tempfile.TemporaryDirectory() as root:
        for number in range(tries):
            folder = Path(root) / f"{number // ROUND}"
            command = [sys.executable, __file__, "--train", str(folder)]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(chance.uniform(3.0, 20.0))
            workers = workers_of(process.pid)
            process.kill()
            process.wait()
            time.sleep(1.0)
            orphans += sum(map(is_running, workers))
            models += len(list(folder.glob("*.onnx")))
            problems += [f"try {number}: {text}" for text in faults(folder, finished=False)]
            if folder.is_dir():
                reports = resume(folder)
                owed, resumed = owed + len(reports), resumed + sum(each.ok for each in reports)
                problems += [f"resumed {number}: {t}" for t in faults(folder, finished=False)]
            if number % ROUND == ROUND - 1:
                train(folder, 2, export=OnnxExport(mlflow=False, background=OPTIONS))
                problems += [f"after {number}: {text}" for text in faults(folder, finished=True)]
            print(f"trainer {number + 1}/{tries}: {len(problems)} problems", flush=True)
    return {
        "killed": tries,
        "orphans": orphans,
        "models seen": models,
        "owed after a kill": owed,
        "of these made without the module": resumed,
        "problems": problems,
    }


def kill_workers(tries: int) -> dict[str, object]:
    """Kill the worker again and again during one training, and train the same without it."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "with"
        killer = Killer(tries)
        export = OnnxExport(mlflow=False, background=OPTIONS)
        module = train(folder, 100_000, killer, export=export)
        problems = faults(folder, finished=True)
        failed = [report.error for report in export.reports if not report.ok]
        return {
            "killed": killer.killed,
            "checkpoints with a report": len(export.reports),
            "reports of failure": failed,
            "steps": len(module.losses),
            "problems": problems,
        }


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--only", choices=("trainer", "worker"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(arguments.train, 10_000, export=OnnxExport(mlflow=False, background=OPTIONS))
        return
    found: dict[str, object] = about()
    if arguments.only != "trainer":
        found["worker"] = kill_workers(arguments.tries)
    if arguments.only != "worker":
        found["trainer"] = kill_trainers(arguments.tries)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kills.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
