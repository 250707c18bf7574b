"""A vision transformer of Hugging Face on real images: one callback makes the models.

The images come with scikit-learn, the weights are random at first, the registry is a sqlite file:
nothing is downloaded. Run it with ``python examples/huggingface_digits.py [folder]``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import mlflow
import torch
from sklearn.datasets import load_digits
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from onnxport.callbacks.transformers import OnnxExport

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
ROWS = [
    {"pixel_values": image, "labels": int(label)}
    for image, label in zip(IMAGES, DIGITS.target, strict=True)
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def accuracy(results: EvalPrediction) -> dict[str, float]:
    """Return the part that is recognised."""
    return {"accuracy": float((results.predictions.argmax(1) == results.label_ids).mean())}


def train(root: Path) -> OnnxExport:
    """Train as ever, with one callback more."""
    torch.set_num_threads(1)  # so small a network is faster so
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    config = ViTConfig(**shape, **SIZES, intermediate_size=64, initializer_range=0.15)
    export = OnnxExport(register="digits-vit")
    arguments = TrainingArguments(
        str(root),
        num_train_epochs=3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=5e-3,
        save_strategy="epoch",
        eval_strategy="epoch",
        metric_for_best_model="accuracy",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        ViTForImageClassification(config),
        arguments,
        train_dataset=ROWS[:1200],
        eval_dataset=ROWS[1200:1500],
        compute_metrics=accuracy,
        callbacks=[export],
    )
    trainer.train()
    return export


def ask_the_champion(root: Path) -> None:
    """Load the best model from the registry, and let it read images that it has never seen."""
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    champion = mlflow.pyfunc.load_model("models:/digits-vit@champion")
    (logits,) = champion.predict({"pixel_values": IMAGES[1500:1505].numpy()}).values()
    print(
        "the champion reads",
        logits.argmax(1).tolist(),
        "true are",
        DIGITS.target[1500:1505].tolist(),
    )


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
