"""PyTorch-Ignite on real images: one line makes the models, the best of them is asked.

The images come with scikit-learn, the registry is a sqlite file. Run it with
``python examples/ignite_digits.py [folder]``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import mlflow
import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import ModelCheckpoint
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport.callbacks.ignite import OnnxExport

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
LABELS = torch.tensor(DIGITS.target)


class Net(nn.Sequential):
    """A small convolutional classifier: ``(N, 1, 8, 8)`` to logits ``(N, 10)``."""

    def __init__(self) -> None:
        body = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*body, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 16, 10))


def train(root: Path, epochs: int = 3) -> OnnxExport:
    """Train with Ignite's engine and its handler for checkpoints, and follow them."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    trainer = create_supervised_trainer(net, optimizer, nn.functional.cross_entropy)
    evaluator = create_supervised_evaluator(net, {"val_acc": Accuracy()})
    images = DataLoader(TensorDataset(IMAGES[1200:1500], LABELS[1200:1500]), 100)

    @trainer.on(Events.EPOCH_COMPLETED)
    def _(engine: Engine) -> None:
        evaluator.run(images)
        engine.state.metrics.update(evaluator.state.metrics)

    saves = ModelCheckpoint(
        root, n_saved=2, score_name="val_acc", require_empty=False, global_step_transform=epoch_of
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saves, {"model": net})
    export = OnnxExport(register="digits-ignite").attach(trainer, saves, model=net)
    trainer.run(DataLoader(TensorDataset(IMAGES[:1200], LABELS[:1200]), 64, shuffle=True), epochs)
    return export


def epoch_of(engine: Engine, _: Events) -> int:
    """Return what the name of a checkpoint says."""
    return engine.state.epoch


def ask_the_champion(root: Path) -> None:
    """Load the best model from the registry, and let it read images that it has never seen."""
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    champion = mlflow.pyfunc.load_model("models:/digits-ignite@champion")
    (name,) = champion.metadata.get_input_schema().input_names()
    (logits,) = champion.predict({name: IMAGES[1500:1505].numpy()}).values()
    print("the champion reads", logits.argmax(1).tolist(), "true are", LABELS[1500:1505].tolist())


def main() -> None:
    """Train, and ask the best model."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="onnxport-"))
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    export = train(root)
    print(sum(report.ok for report in export.reports), "proven models in", root)
    ask_the_champion(root)


if __name__ == "__main__":
    main()
