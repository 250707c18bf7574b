"""What a checkpoint costs where several processes train: seconds that they wait, and memory.

    python benchmarks/scale.py [--processes 1,2,4] [--strategies DDP,FSDP2] [--mb 100]
        [--checkpoints 26] [--out DIR]

Each fit is run by processes of its own, over gloo, with one thread each. A network of equal linear
layers is saved every few steps; a pause before each save stands for the computing that goes on
elsewhere. *Stall* is by how much a save takes longer than the same save without the callback, in
the process that waits longest: the median of all saves but the first 14, during which the first
export is made. *Memory* is the most that a process holds above what it held when the save began
(anonymous memory, and the file in memory that goes to the worker), less what it is without the
callback.

Rows:

- *export*: ``OnnxExport()``.
- *to_onnx*: what people write by hand, ``module.to_onnx`` on rank zero after each save.

Strategies are DDP, and FSDP2 (``ModelParallelStrategy``) with distributed checkpoints, which are
written by all processes; what belongs to the callback there is that the weights are put together.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lockstep_report import about, part_about
from torch import nn
from torch.distributed.fsdp import fully_shard

RESULTS = Path(__file__).parent / "results"
Found = dict[str, Any]

WIDTH = 1024
PAUSE_S = 1.0
STEPS = 3
"""Between two checkpoints."""
WARM = 14
"""Checkpoints that are not counted: the first export is done by then."""
SAMPLE_S = 0.002
LIMIT_S = 300.0
HOPELESS_S = 90.0
"""What people write by hand hangs where weights are spread; one fit takes a minute."""
STRATEGIES = ("DDP", "FSDP2")
ROWS = ("none", "export", "to_onnx")


class Layers(pl.LightningModule):
    """Linear layers of one width.

    Args:
        count: How many.
        sharded: Whether their parameters are spread over the processes.
    """

    def __init__(self, count: int, *, sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))
        self.sharded = sharded

    def configure_model(self) -> None:
        """Spread the parameters, layer by layer."""
        if self.sharded:
            for layer in (*self.layers, self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Take and give features of shape (N, width)."""
        for layer in self.layers:
            features = features + layer(features).tanh()
        return features

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Make the outputs small."""
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent: nothing else in memory."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Pause(Callback):
    """Waits before each save, as computing elsewhere would."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Sleep."""
        if (trainer.global_step + 1) % STEPS == 0:
            time.sleep(PAUSE_S)


class Meter:
    """Measures each save of a trainer in this process."""

    def __init__(self, trainer: Any, row: str) -> None:
        self.trainer, self.row = trainer, row
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.save = trainer.save_checkpoint
        trainer.save_checkpoint = self

    def __call__(self, path: Any, *args: Any, **options: Any) -> None:
        """Save."""
        before, most, done = held(), [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(most, done))
        watcher.start()
        if self.trainer.world_size > 1:
            torch.distributed.barrier()
        start = time.perf_counter()
        self.save(path, *args, **options)
        if self.row == "to_onnx" and self.trainer.is_global_zero:
            module = self.trainer.lightning_module
            module.to_onnx(Path(path).with_suffix(".onnx"), torch.randn(8, WIDTH), dynamo=False)
        if self.trainer.world_size > 1:
            torch.distributed.barrier()  # who is first waits for who exports
        self.seconds.append(time.perf_counter() - start)
        done.set()
        watcher.join()
        self.bytes.append(max(0, most[0] - before))


def held() -> int:
    """Return how many bytes this process holds: its own, and files in memory."""
    status = Path("/proc/self/status").read_text()
    own = next(int(row.split()[1]) << 10 for row in status.splitlines() if row[:8] == "RssAnon:")
    # A file may have several descriptors.
    return own + sum(dict(map(_in_memory, Path("/proc/self/fd").iterdir())).values())


def _in_memory(descriptor: Path) -> tuple[int, int]:
    try:
        mine = "memfd:onnxport" in str(descriptor.readlink())
        found = descriptor.stat()
        return (found.st_ino, found.st_blocks * 512) if mine else (0, 0)
    except OSError:  # closed meanwhile
        return 0, 0


def watch(most: list[int], done: threading.Event) -> None:
    """Keep the largest of what is held until somebody is done."""
    while not done.is_set():
        most[0] = max(most[0], held())
        time.sleep(SAMPLE_S)


def train(folder: Path, strategy: str, row: str, processes: int, count: int, saves: int) -> None:
    """Train in this process, one of several, and write down what was measured."""
    from onnxport import OnnxExport

    export = OnnxExport()
    sharded = strategy == "FSDP2"
    parallel = ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=True
    )
    keeps = ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=STEPS, save_top_k=1, monitor=None
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=parallel if sharded else "ddp" if processes > 1 else "auto",
        max_steps=STEPS * saves,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keeps, Pause(), *([export] if row == "export" else [])],
    )
    meter = Meter(trainer, row)
    rows = torch.utils.data.TensorDataset(torch.randn(8 * STEPS * saves * processes, WIDTH))
    trainer.fit(Layers(count, sharded=sharded), torch.utils.data.DataLoader(rows, 8))
    found = {
        "seconds": meter.seconds[WARM:],
        "bytes": meter.bytes[WARM:],
        "models": [report.ok for report in export.reports],
        "own": [report.seconds["stall"] for report in export.reports if report.ok][WARM:],
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


def run(strategy: str, row: str, processes: int, count: int, saves: int) -> Found:
    """Run one fit in processes of its own; return what each of them measured."""
    limit_s = HOPELESS_S if (strategy, row) == ("FSDP2", "to_onnx") else LIMIT_S
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="onnxport-") as place:
        free.bind(("127.0.0.1", 0))
        world = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(processes),
            "NODE_RANK": "0",
            "OMP_NUM_THREADS": "1",
        }
        free.close()
        options = [strategy, row, str(processes), str(count), str(saves)]
        with (Path(place) / "log").open("w") as log:
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--one", place, *options],
                    env=os.environ | world | {"LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(processes)
            ]
            try:
                codes = [rank.wait(timeout=limit_s) for rank in ranks]
            except subprocess.TimeoutExpired:
                return {"failed": f"nobody had finished after {limit_s:.0f} s"}
            finally:
                for rank in ranks:
                    rank.kill()
        if any(codes):
            last = (Path(place) / "log").read_text().strip().splitlines()[-1:]
            return {"failed": "".join(last)[:200]}
        files = [Path(place) / f"rank{rank}.json" for rank in range(processes)]
        return {"ranks": [json.loads(file.read_text()) for file in files]}


def figures(found: Found, plain: Found, weights: int) -> Found:
    """Compare a fit with the one without export."""
    if "failed" in found:
        return found
    waited = [median(rank["seconds"]) for rank in found["ranks"]]
    without = [median(rank["seconds"]) for rank in plain["ranks"]]
    memory = [
        (median(rank["bytes"]) - median(other["bytes"])) / weights
        for rank, other in zip(found["ranks"], plain["ranks"], strict=True)
    ]
    return {
        "save": max(waited),
        "stall": max(a - b for a, b in zip(waited, without, strict=True)),
        "memory": memory,
        "models": sum(found["ranks"][0]["models"]),
        "own": median(found["ranks"][0]["own"] or [0.0]),
    }


def table(results: list[Found]) -> list[str]:
    """Return the lines of a table."""
    head = (
        "| strategy | processes | row | save, s | stall, s | x one process | stall in the "
        "callback's own code, s | memory of rank 0, x weights | of the others | models |"
    )
    lines = [head, "|---" * 10 + "|"]
    for one in results:
        start = f"| {one['strategy']} | {one['processes']} | {one['row']} |"
        if "failed" in one:
            lines.append(f"{start} {one['failed']} | | | | | | |")
            continue
        first = next(
            r["stall"]
            for r in results
            if (r["strategy"], r["row"]) == (one["strategy"], one["row"]) and "stall" in r
        )
        plain = one["row"] == "none"
        times = f" {one['stall']:.3f} | {one['stall'] / first:.2f} |" if not plain else " | |"
        others = max(one["memory"][1:], default=0.0)
        own = f"{one['own']:.3f}" if one["row"] == "export" else ""
        memory = f"{one['memory'][0]:.2f} | {others:.2f}" if not plain else " | "
        models = one["models"] if one["row"] == "export" else ""
        lines.append(f"{start} {one['save']:.3f} |{times} {own} | {memory} | {models} |")
    return lines


def _earlier(folder: Path) -> list[Found]:
    """Return the rows that were measured before, of which others may be kept."""
    file = folder / "scale.json"
    found: list[Found] = json.loads(file.read_text())["results"] if file.exists() else []
    return found


def main() -> None:
    """Measure all rows, or be one process of one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--one", nargs=6)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--mb", type=float, default=100.0)
    parser.add_argument("--checkpoints", type=int, default=26)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.one:
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        torch.set_num_threads(1)
        folder, strategy, row, *numbers = given.one
        train(Path(folder), strategy, row, *map(int, numbers))
        return
    count = max(1, round(given.mb * 1e6 / (4 * WIDTH * (WIDTH + 1))))
    weights = count * 4 * WIDTH * (WIDTH + 1)
    chosen = given.strategies.split(",")
    results = [one for one in _earlier(given.out) if one["strategy"] not in chosen]
    for strategy in chosen:
        hopeless: set[str] = set()
        for processes in map(int, given.processes.split(",")):
            plain: Found = {}
            for row in ROWS:
                if row in hopeless:
                    continue
                found = run(strategy, row, processes, count, given.checkpoints)
                plain = plain or found
                hopeless |= {row} if "failed" in found else set()
                one = {"strategy": strategy, "processes": processes, "row": row}
                results.append(one | figures(found, plain, weights))
                print(json.dumps(results[-1]), flush=True)
    machine = about() | part_about()
    content = {"about": machine, "weights": weights, "largest": 1 / count, "results": results}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scale.json").write_text(json.dumps(content, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = (
        "# A checkpoint where several processes train\n\n"
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory']}\n"
        f"- Python {machine['python']}; {versions}\n"
        f"- {machine['date']}, commit {machine['commit']}; weights of {weights / 1e6:.0f} MB in "
        f"{count} layers, so that the largest parameter is {1 / count:.2f} of them\n\n"
        + (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
        + "\n"
        + "\n".join(table(results))
        + "\n"
    )
    (given.out / "scale.md").write_text(text)


if __name__ == "__main__":
    main()
