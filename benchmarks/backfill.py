"""Make the models of a thousand old checkpoints, in several processes, from one export.

    python benchmarks/backfill.py [--checkpoints 1000] [--processes 2]

A convolutional network of 0.3 million weights is saved as Lightning saves it, with other weights
each time; then :func:`onnxport.backfill` makes the models, each proven as always. Results go to
``benchmarks/results/backfill.*``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as pl
import onnxruntime
import torch
from torch import nn
from typing_extensions import override

import onnxport
from onnxport.exporter.ownership import read_metadata

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "onnx", "onnxruntime")
LOOKED_AT = 25
"""Each so-manieth model is run and compared with its checkpoint once more."""


class Net(pl.LightningModule):
    """A small network for images of 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 90),
            nn.ReLU(),
            nn.Linear(90, 10),
        )

    @override
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)


def save(folder: Path, count: int) -> None:
    """Write checkpoints whose weights all differ."""
    torch.manual_seed(0)
    module = Net()
    for step in range(count):
        with torch.no_grad():
            for tensor in module.parameters():
                tensor.add_(0.01 * torch.randn_like(tensor))
        content = {"state_dict": module.state_dict(), "epoch": 0, "global_step": step}
        torch.save(content, folder / f"step={step:04d}.ckpt")


def wrong(folder: Path) -> list[str]:
    """Look at some of the models: their weights, and what they compute."""
    found = []
    for checkpoint in sorted(folder.glob("*.ckpt"))[::LOOKED_AT]:
        model, module = checkpoint.with_suffix(".onnx"), Net().eval()
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        module.load_state_dict(state)
        image = torch.randn(3, 1, 28, 28)
        session = onnxruntime.InferenceSession(model)
        (actual,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            same = torch.allclose(torch.from_numpy(actual), module(image), atol=1e-4, rtol=1e-3)
        noted = read_metadata(model)["weights_sha256"]
        if not same or noted != onnxport.weights_sha256(state):
            found.append(checkpoint.name)
    return found


def main() -> None:
    """Save, backfill, look, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, given.checkpoints)
        start = time.perf_counter()
        module, image = Net(), torch.randn(8, 1, 28, 28)
        reports = onnxport.backfill(folder, module, image, workers=given.processes)
        seconds = time.perf_counter() - start
        facts = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "checkpoints": given.checkpoints,
            "processes": given.processes,
            "proven": sum(report.ok for report in reports),
            "refreshed": sum(report.how == "refresh" for report in reports),
            "errors": sorted({str(report.error)[:200] for report in reports if not report.ok}),
            "seconds": round(seconds, 1),
            "per_minute": round(60 * len(reports) / seconds),
            "looked_at": len(range(0, given.checkpoints, LOOKED_AT)),
            "wrong": wrong(folder),
        }
    (RESULTS / "backfill.json").write_text(json.dumps(facts, indent=1) + "\n")
    known = ", ".join(f"{package} {found}" for package, found in facts["versions"].items())
    rows = [(key, facts[key]) for key in list(facts)[4:]]
    text = f"# Backfill\n\n{facts['date']}, {known}, {facts['machine']}. Made by "
    text += "`benchmarks/backfill.py`.\n\n| | |\n|---|---|\n"
    for key, value in rows:
        shown = "; ".join(value) if isinstance(value, list) else value
        text += f"| {key.replace('_', ' ')} | {shown or 'none'} |\n"
    (RESULTS / "backfill.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
