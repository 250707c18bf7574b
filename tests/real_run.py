"""A real run for the page of a run: training, models, checks and files are real."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport import ExportReport, OnnxExport
from onnxport.page.history import HISTORY, append

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Glyphs(pl.LightningModule):
    """Reads an image row by row: a transformer with two outputs, for images of any height."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.LayerNorm(48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.project = nn.Linear(48, 16)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(48, 10))

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.encoder(self.embed(rows)).mean(1)
        return {"logits": self.head(seen), "embedding": self.project(seen)}

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        height = 6 + index % 3  # images are cut, so that more than one height is seen
        loss = nn.functional.cross_entropy(self(batch[0][:, :height])["logits"], batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        logits = self(batch[0])["logits"]
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trained(folder: Path, epochs: int, layers: int) -> list[ExportReport]:
    """Train on real images with the callback there; return its reports."""
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, val = (
        TensorDataset(images[:1200], labels[:1200]),
        TensorDataset(images[1200:], labels[1200:]),
    )
    export = OnnxExport()
    saves = ModelCheckpoint(
        folder, filename="{epoch:02d}", monitor="val_acc", mode="max", save_top_k=3
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[export, saves],
    )
    trainer.fit(Glyphs(layers), DataLoader(train, 64, shuffle=True), DataLoader(val, 200))
    return export.reports


def write_history(folder: Path, reports: Sequence[ExportReport]) -> None:
    """Write the history of a run, as a callback does."""
    for report in reports:
        append(folder / HISTORY, report, monitor="val_acc", mode="max")
