"""accelerate on real images: one line makes the models, the best of them is asked.

The images come with scikit-learn, the registry is a sqlite file. Run it with
``python examples/accelerate_digits.py [folder]``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import mlflow
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport.callbacks.accelerate import OnnxExport

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
LABELS = torch.tensor(DIGITS.target)


class Net(nn.Sequential):
    """A small convolutional classifier: ``(N, 1, 8, 8)`` to logits ``(N, 10)``."""

    def __init__(self) -> None:
        body = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*body, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 16, 10))


def accuracy(net: nn.Module) -> float:
    """Return the part of the images for validation that are recognised."""
    net.eval()
    with torch.no_grad():
        right = (net(IMAGES[1200:1500]).argmax(1) == LABELS[1200:1500]).float().mean().item()
    net.train()
    return right


def train(root: Path, epochs: int = 3) -> OnnxExport:
    """Train with accelerate and one line; ``save_state`` writes checkpoints as ever."""
    torch.manual_seed(0)
    places = ProjectConfiguration(str(root), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=places)
    net = Net()
    data = DataLoader(TensorDataset(IMAGES[:1200], LABELS[:1200]), 64, shuffle=True)
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.Adam(net.parameters(), lr=3e-3), data
    )
    export = OnnxExport(monitor="val_acc", mode="max", register="digits-accelerate")
    export.attach(accelerator)
    for _ in range(epochs):
        for image, label in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(net(image), label))
            optimizer.step()
        accelerator.log({"val_acc": accuracy(net)})
        accelerator.save_state()
    accelerator.end_training()
    return export


def ask_the_champion(root: Path) -> None:
    """Load the best model from the registry, and let it read images that it has never seen."""
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    champion = mlflow.pyfunc.load_model("models:/digits-accelerate@champion")
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
