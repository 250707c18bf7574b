"""Measure what ONNX export during training costs, and what it gives.

Three models are trained without export, with the callback that people write by hand, and with
``OnnxExport()``. Run it with ``make bench`` or ``python benchmarks/baseline.py [--quick]``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from workloads import WORKLOADS, Classifier, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

# onnxport and onnxruntime are imported where they are used: imported here, they would load parts
# of the exporters before the hand-written callbacks need them.

EPOCHS = 3
REPEATS = 3
THREADS = 1
"""Of torch. Two threads that wait for each other while another process has one of the cores made
the same fit take more than ten times as long."""
ODD = 7
"""A batch size that no run trains with."""
TOLERANCE = 1e-3
ROWS = {
    "none": "no callback",
    "dynamo": "to_onnx(dynamo=True)",
    "torchscript": "to_onnx(dynamo=False)",
    "onnxport": "OnnxExport()",
}
COLUMNS = (
    *("model", "callback", "fit, s", "stall at first checkpoint, s: median (max)"),
    *("at later ones: median (max)", "models written", "right at batch 1/observed/odd"),
)
ABOUT = f"""\
Each model was trained for {EPOCHS} epochs on the CPU with {THREADS} torch thread and a checkpoint \
at the end of each epoch, every fit in a process of its own and the rows in turn; fit time is a \
median over fits and includes making the callback, a stall is the time inside the hand-written \
hook or `report.seconds["total"]`, and models are counted over all fits. A model is right at a \
batch size (1, that of training, or {ODD}) if ONNX Runtime loads it and agrees with PyTorch in \
eval mode with the weights of the checkpoint, max abs(d)/(1+abs(ref)) <= {TOLERANCE:g}. This is a \
baseline to compare later versions with, and has no target."""

Run = dict[str, Any]


class HandWritten(pl.Callback):
    """The usual callback: export at every checkpoint, all defaults but the exporter."""

    def __init__(self, folder: Path, sample: torch.Tensor, *, dynamo: bool) -> None:
        self.folder = folder
        self.sample = sample
        self.dynamo = dynamo
        self.stalls: list[float] = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, _: dict[str, Any]
    ) -> None:
        """Export, and note how long it took."""
        start = time.perf_counter()
        try:
            name = f"epoch={trainer.current_epoch}-step={trainer.global_step}.onnx"
            pl_module.to_onnx(self.folder / name, self.sample, dynamo=self.dynamo)
        finally:
            self.stalls.append(time.perf_counter() - start)


def make_callback(row: str, folder: Path, sample: torch.Tensor) -> Any:
    """Return the callback of a row, or ``None``."""
    if row == "onnxport":
        from onnxport import OnnxExport

        callback: Any = OnnxExport()
        return callback
    return None if row == "none" else HandWritten(folder, sample, dynamo=row == "dynamo")


def stalls_of(callback: pl.Callback | None) -> list[float]:
    """Return how long training stood still at each checkpoint."""
    if isinstance(callback, HandWritten):
        return callback.stalls
    return [report.seconds["total"] for report in getattr(callback, "reports", [])]


def run_fit(model: str, row: str, folder: Path) -> Run:
    """Train once, and try every model that was written."""
    workload = WORKLOADS[model]
    torch.set_num_threads(THREADS)
    pl.seed_everything(0, verbose=False)
    data = workload.data()
    module = Classifier(workload.build())
    # From here: OnnxExport imports the exporters when it is made, the others in their first hook.
    start, start_cpu = time.perf_counter(), time.process_time()
    extra = make_callback(row, folder, data[: workload.batch][0])
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1), *([extra] if extra else [])],
        logger=False,
        enable_progress_bar=False,
    )
    error = None
    try:
        trainer.fit(module, DataLoader(data, workload.batch, shuffle=True))
    except Exception as raised:  # noqa: BLE001 - that a callback ends training is a result
        error = type(raised).__name__
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    pairs = [(file, file.with_suffix(".onnx")) for file in sorted(folder.glob("*.ckpt"))]
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "fit_seconds": seconds,
        "fit_cpu_seconds": cpu,
        "stall_seconds": stalls_of(extra),
        "ended_by": error,
        "cores": [report.core for report in getattr(extra, "reports", [])],
        "models": [try_model(workload, *pair) for pair in pairs if pair[1].exists()],
    }


def try_model(workload: Workload, checkpoint: Path, path: Path) -> dict[str, float | str]:
    """Return the error against PyTorch per batch size, or the name of what went wrong."""
    module = Classifier(workload.build()).eval()
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    images = workload.data().tensors[0]
    sizes = {"1": 1, "observed": workload.batch, "odd": ODD}
    found: dict[str, float | str] = {}
    for name, size in sizes.items():
        try:
            found[name] = error_of(module, path, images[:size])
        except Exception as raised:  # noqa: BLE001 - whatever ONNX Runtime raises is a result
            found[name] = type(raised).__name__
    return found


def error_of(module: nn.Module, path: Path, images: torch.Tensor) -> float | str:
    """Return max |d|/(1+|ref|) of a model in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answer = torch.tensor(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        expected = module(images)
    if answer.shape != expected.shape:
        return "wrong shape"
    error = float(((answer - expected).abs() / (1 + expected.abs())).max())
    return error if math.isfinite(error) else "not finite"


def run_all(repeats: int) -> list[Run]:
    """Run every row of every model, in turns, so that a slow minute falls on all of them."""
    turns = [(n, model, row) for n in range(repeats) for model in WORKLOADS for row in ROWS]
    runs = []
    for place, (repeat, model, row) in enumerate(turns, 1):
        run = run_apart(model, row)
        runs.append({"model": model, "row": row, "repeat": repeat, **run})
        how = run["ended_by"] or f"{run['fit_seconds']:.1f} s"
        print(f"[{place}/{len(turns)}] {model}, {ROWS[row]}: {how}", flush=True)
    return runs


def run_apart(model: str, row: str) -> Run:
    """Run a fit in a new process, with an empty folder of its own.

    Raises:
        RuntimeError: If the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="onnxport-bench-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--fit", model, row, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{model}, {row} failed:\n{done.stderr[-2000:]}")
        run: Run = json.loads(result.read_text(encoding="utf-8"))
        return run


def describe_machine() -> dict[str, str]:
    """Return what the figures depend on, without names or paths of the machine."""
    names = ("torch", "lightning", "onnx", "onnxscript", "onnxruntime", "onnxport")
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def summarize(runs: list[Run], model: str, row: str) -> list[str]:
    """Return the cells of a row."""
    mine = [run for run in runs if (run["model"], run["row"]) == (model, row)]
    head = [f"{model}, {mine[0]['parameters'] * 4 / 1e6:.1f} MB", ROWS[row]]
    ended = next((run["ended_by"] for run in mine if run["ended_by"]), None)
    stalls = [run["stall_seconds"] for run in mine if not ended]
    models = [found for run in mine for found in run["models"]]
    rights = (sum(is_right(found[size]) for found in models) for size in ("1", "observed", "odd"))
    return [
        *head,
        f"ends training: {ended}" if ended else f"{median(r['fit_seconds'] for r in mine):.1f}",
        spread(first for run in stalls for first in run[:1]),
        spread(later for run in stalls for later in run[1:]),
        "-" if row == "none" else f"{len(models)} of {EPOCHS * len(mine)}",
        "/".join(map(str, rights)) if models else "-",
    ]


def is_right(found: float | str) -> bool:
    """Tell whether a model agreed with PyTorch."""
    return isinstance(found, float) and found <= TOLERANCE


def spread(values: Iterable[float]) -> str:
    """Return median and maximum."""
    known = list(values)
    return f"{median(known):.2f} ({max(known):.2f})" if known else "-"


def write_results(folder: Path, cells: list[list[str]], raw: dict[str, Any]) -> None:
    """Write the table as markdown and the figures as JSON."""
    repeats = f"Fits per row: {raw['repeats']}."
    lines = ["# Baseline", "", *(f"- {name}: {text}" for name, text in raw["machine"].items())]
    lines += ["", f"{ABOUT} {repeats}", ""]
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *cells]
    lines += [f"| {' | '.join(row)} |" for row in table]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "baseline.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps(raw, indent=2, allow_nan=False)
    (folder / "baseline.json").write_text(text + "\n", encoding="utf-8")


def measure(repeats: int, output: Path) -> None:
    """Run everything, print the table and write it."""
    runs = run_all(repeats)
    cells = [summarize(runs, model, row) for model in WORKLOADS for row in ROWS]
    table = Table(*COLUMNS, box=box.SIMPLE)
    for row in cells:
        table.add_row(*row)
    Console(width=180).print(table)
    raw = {"machine": describe_machine(), "repeats": repeats, "epochs": EPOCHS, "runs": runs}
    write_results(output, cells, raw)


def main() -> None:
    """Measure everything, or run one fit when called by this script itself."""
    parser = argparse.ArgumentParser(description="Measure the cost of exporting while training.")
    parser.add_argument("--quick", action="store_true", help="one fit per row")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results, help="folder for the results")
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fit is None:
        measure(1 if arguments.quick else REPEATS, arguments.output)
        return
    model, row, folder = arguments.fit
    run = run_fit(model, row, Path(folder))
    (Path(folder) / "result.json").write_text(json.dumps(run), encoding="utf-8")


if __name__ == "__main__":
    main()
