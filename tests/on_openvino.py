"""What tests do in a process whose ONNX Runtime is the one with OpenVINO.

    python tests/on_openvino.py exports FOLDER
    python tests/on_openvino.py training FOLDER

Prints a line of JSON: the reports by name; a failure is a text.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import onnxport
from onnxport.errors import OnnxportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPENVINO = "OpenVINOExecutionProvider"
ASKED = onnxport.Verify(providers=(OPENVINO,))


class Pictures(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).mean((2, 3)))


class Series(nn.Module):
    """A recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        return self.lstm(series)[0][:, -1]


class Mends(nn.Module):
    """Asks for NaN, which OpenVINO leaves to others, between layers that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(torch.where(x.isnan(), torch.zeros_like(x), x))


class IsNan(nn.Module):
    """Is nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.isnan()


class Samples(nn.Module):
    """Has an operator that OpenVINO takes and does not load: a mode's name is new in opset 20."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = x.permute(0, 2, 3, 1).tanh()
        return nn.functional.grid_sample(x, grid, align_corners=False)


def _bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(intermediate_size=32, vocab_size=50, max_position_embeddings=32, **sizes)
    ids = torch.randint(1, 50, (3, 7))
    return BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _vit() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(intermediate_size=32, image_size=16, patch_size=8, **sizes)
    return ViTModel(config), {"pixel_values": torch.randn(3, 3, 16, 16)}


CASES: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "pictures": lambda: (Pictures(), torch.randn(4, 1, 8, 8), {}),
    "series": lambda: (Series(), torch.randn(4, 5, 4), {}),
    "bert": lambda: (*_bert(), {}),
    "vit": lambda: (*_vit(), {"verify": ASKED}),
    "mends": lambda: (Mends(), torch.randn(4, 4), {}),
    "mends, asked": lambda: (Mends(), torch.randn(4, 4), {"verify": ASKED}),
    "nan": lambda: (IsNan(), torch.randn(4, 4), {}),
    "nan, asked": lambda: (IsNan(), torch.randn(4, 4), {"verify": ASKED}),
    "samples": lambda: (Samples(), torch.randn(4, 2, 3, 3), {}),
    "samples, asked": lambda: (Samples(), torch.randn(4, 2, 3, 3), {"verify": ASKED}),
}


def exports(folder: Path) -> Iterator[tuple[str, Any]]:
    """Export each model, traced: dynamo takes a second more for each."""
    for name, make in CASES.items():
        module, example, options = make()
        path = folder / f"{name}.onnx"
        opset = 20 if name.startswith("samples") else None
        try:
            found = onnxport.export(module, example, path, core="trace", opset=opset, **options)
        except OnnxportError as error:
            yield name, str(error)
        else:
            yield name, json.loads(found.to_json())


def training(folder: Path) -> Iterator[tuple[str, Any]]:
    """Train with torch's default exporter, in the training process."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    export = onnxport.OnnxExport(background=False, console=False, latency=3.0)
    keep = ModelCheckpoint(folder / "checkpoints", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=1,
        logger=False,
        accelerator="cpu",
        callbacks=[keep, export],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    for place, report in enumerate(export.reports):
        yield str(place), json.loads(report.to_json())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    what = {"exports": exports, "training": training}[sys.argv[1]]
    sys.stdout.write(json.dumps(dict(what(Path(sys.argv[2])))) + "\n")
