"""Small LightningModules and plain modules, one per thing that can go wrong."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROWS = 24
BATCH = 8


class Rows(Dataset):
    """Random images of shape (1, 8, 8) with a label that depends on them."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(rows, 1, 8, 8, generator=generator)
        self.labels = (self.images.sum((1, 2, 3)) > 0).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


class Classifier(pl.LightningModule):
    """Trains any module that gives logits of shape (N, 3) for images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self(batch["image"])

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.logits(batch), batch["label"])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        accuracy = (self.logits(batch).argmax(1) == batch["label"]).float().mean()
        self.log("val_acc", accuracy)
        self.log("val_loss", nn.functional.cross_entropy(self.logits(batch), batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class FrozenNorm(Classifier):
    """Fine-tuning as people do it: BatchNorm frozen in eval mode, dropout on."""

    def on_train_start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)


class NoForward(Classifier):
    """Calls a child in its steps; ``forward`` is never called."""

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net(batch["image"])


class OnlySteps(pl.LightningModule):
    """Does not even override ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        self.backbone = cnn()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.criterion(self.backbone(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Answer(NamedTuple):
    """A result with names."""

    logits: torch.Tensor
    label: torch.Tensor


class Structured(Classifier):
    """A dict in, keyword and None arguments, integers in, a named tuple inside a dict out."""

    def __init__(self) -> None:
        super().__init__(cnn())
        self.embed = nn.Embedding(3, 3)

    def forward(
        self, batch: dict[str, torch.Tensor], *, scale: float = 1.0, mask: Any = None
    ) -> dict[str, Any]:
        logits = self.net(batch["image"]) * scale + self.embed(batch["kind"])
        if mask is not None:
            logits = logits * mask
        return {"answer": Answer(logits, logits.argmax(1)), "sizes": [logits.mean(1)]}

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {"image": batch["image"], "kind": batch["label"]}
        return self(inputs, scale=2.0, mask=None)["answer"].logits


class Tied(nn.Module):
    """An encoder and a decoder that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.outer = nn.Linear(64, 64)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.outer(self.inner(image.flatten(1)).relu()))


class Transformer(nn.Module):
    """Reads an image as a sequence of 8 rows; eval mode has a fused fast path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(image.squeeze(1)).mean(1))


class BatchSizeBranch(nn.Module):
    """Computes something else for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.head(image.flatten(1))
        if image.shape[0] > 4:
            logits = logits * 2
        return logits


class DataBranch(nn.Module):
    """Computes something else for dark batches."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.head(image.flatten(1))
        if image.sum() > 0:
            logits = logits * 2
        return logits


class BakedShape(nn.Module):
    """Keeps the batch size that it first saw in a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        rows = int(torch.tensor(image.shape[0]).item())
        return self.head(image.reshape(rows, 64))


class PythonInside(nn.Module):
    """Leaves torch in the middle: no core can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        shift = json.loads(json.dumps(image.mean().item()))  # a line that no core can export
        return self.head(image.flatten(1)) + shift


class NoTranslation(nn.Module):
    """Uses an operator that has no ONNX form."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        square = image.squeeze(1) + torch.eye(8)
        values = torch.linalg.eigvals(square).real  # an operator that no core can export
        return self.head(image.flatten(1)) + values.sum(1, keepdim=True)


class RandomInEval(nn.Module):
    """Forgets to switch its dropout off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(image.flatten(1), 0.5))


def cnn() -> nn.Sequential:
    """A small convolutional network with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * 36, 3),
    )


def loader(rows: int = ROWS, *, shuffle: bool = True) -> DataLoader:
    """A loader of images; the last batch is whole."""
    return DataLoader(Rows(rows), BATCH, shuffle=shuffle)


def trainer(root: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> pl.Trainer:
    """A quiet trainer on the CPU."""
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **settings
        | {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "default_root_dir": root,
            "callbacks": list(callbacks),
        }
        | options
    )


def checkpoints(root: Any, **options: Any) -> ModelCheckpoint:
    """Keep every checkpoint, unless told otherwise."""
    return ModelCheckpoint(**{"dirpath": root / "checkpoints", "save_top_k": -1} | options)
