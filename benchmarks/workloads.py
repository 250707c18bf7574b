"""The models that the benchmark trains, and their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WORKLOADS", "Classifier", "Workload"]


def cnn() -> nn.Module:
    """Return a convolutional network, about 1 MB."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 16, 448), nn.ReLU(), nn.Dropout(0.2), nn.Linear(448, 10)),
    )


def transformer() -> nn.Module:
    """Return a transformer that reads an image row by row, about 20 MB."""
    layer = nn.TransformerEncoderLayer(256, nhead=8, dim_feedforward=1024, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=6)
    return nn.Sequential(nn.Linear(8, 256), encoder, nn.Flatten(), nn.Linear(8 * 256, 10))


class Recurrent(nn.Module):
    """An LSTM that reads an image row by row, about 10 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 448, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(448, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.lstm(rows)[0][:, -1])
        return logits


@dataclass(frozen=True, slots=True)
class Workload:
    """A network and its data: how many images, in what shape, in batches of what size."""

    build: Callable[[], nn.Module]
    images: int
    shape: tuple[int, ...]
    batch: int

    def data(self) -> TensorDataset:
        """Return the first of scikit-learn's digits with their labels."""
        digits = load_digits()
        images = torch.tensor(digits.images[: self.images], dtype=torch.float32) / 16
        labels = torch.tensor(digits.target[: self.images])
        return TensorDataset(images.reshape(-1, *self.shape), labels)


WORKLOADS = {
    "CNN": Workload(cnn, 1797, (1, 8, 8), 64),
    "transformer": Workload(transformer, 500, (8, 8), 16),
    "LSTM": Workload(Recurrent, 500, (8, 8), 32),
}


class Classifier(pl.LightningModule):
    """Trains a network that classifies digits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the network's logits."""
        logits: torch.Tensor = self.net(image)
        return logits

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        image, label = batch
        return nn.functional.cross_entropy(self(image), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)
