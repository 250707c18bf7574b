"""Train on real images, get proven ONNX models, and serve the best one; train again, and go back.

Everything is local: scikit-learn ships the images, MLflow keeps its store in a sqlite file. Run it
with ``make demo`` or ``python examples/digits.py [folder]``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport import ExportReport, OnnxExport
from onnxport.tracking import rollback

if TYPE_CHECKING:
    from collections.abc import Iterator


class Digits(pl.LightningModule):
    """A small convolutional classifier of 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32 * 16, 10),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits of shape ``(N, 10)`` for images of shape ``(N, 1, 8, 8)``."""
        return self.net(image)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        image, label = batch
        loss = nn.functional.cross_entropy(self(image), label)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """Log the accuracy on a batch."""
        image, label = batch
        self.log("val_acc", (self(image).argmax(1) == label).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def load_data() -> tuple[DataLoader, DataLoader, torch.Tensor]:
    """Return loaders for training and validation, and the images of a test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:1200], labels[:1200])
    val = TensorDataset(images[1200:1500], labels[1200:1500])
    return DataLoader(train, 64, shuffle=True), DataLoader(val, 100), images[1500:]


def train(root: Path, name: str, epochs: int) -> tuple[OnnxExport, ModelCheckpoint]:
    """Train with one callback more than usual."""
    pl.seed_everything(0)
    train_loader, val_loader, _ = load_data()
    export = OnnxExport(register="digits")
    best = ModelCheckpoint(
        dirpath=root / name,
        filename="{epoch}-{val_acc:.3f}",
        monitor="val_acc",
        mode="max",
        save_top_k=2,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=root,
        callbacks=[export, best],
        logger=MLFlowLogger(
            "digits",
            run_name=name,
            tracking_uri=tracking_uri(root),
            artifact_location=(root / "artifacts").as_uri(),
        ),
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(Digits(), train_loader, val_loader)
    return export, best


def tracking_uri(root: Path) -> str:
    """Return the address of the embedded default: a sqlite file."""
    return f"sqlite:///{root / 'mlflow.db'}"


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve the champion on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits@champion"]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port), "--workers", "1"]
    # MLflow starts the server by its bare name: this environment's programs must be found first,
    # also where nobody activated it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(root), "PATH": path}
    log = (root / "serve.log").open("w")
    with (
        log,
        subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", server, Path(log.name))
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself, which was said
                os.killpg(server.pid, signal.SIGTERM)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the model server stopped:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer within {seconds} s; see {log}")


def ask(url: str, images: torch.Tensor) -> torch.Tensor:
    """Post images to the served model and return its logits."""
    body = json.dumps({"inputs": {"image": images.tolist()}}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return torch.tensor(json.load(answer)["predictions"]["output"])


def check_served_answers(root: Path, best: str) -> None:
    """Compare what the champion answers over HTTP with PyTorch."""
    _, _, images = load_data()
    model = Digits.load_from_checkpoint(best, map_location="cpu", weights_only=False).eval()
    with served(root) as url:
        for count in (1, 5):
            with torch.no_grad():
                expected = model(images[:count])
            answers = ask(url, images[:count])
            torch.testing.assert_close(answers, expected)
            error = (answers - expected).abs().max().item()
            print(f"served champion, {count} test image(s): equal to PyTorch within {error:.1e}")


def show(reports: list[ExportReport], picture: Path) -> None:
    """Print what became of each checkpoint, and keep it as a picture."""
    table = Table(title="onnxport: every checkpoint, proven")
    for column in ("checkpoint", "core", "batch sizes proven", "max error", "budget"):
        table.add_column(column, no_wrap=column == "checkpoint")
    for column in ("val_acc", "version", "alias", "on disk"):
        table.add_column(column)
    champion = max((r for r in reports if r.tracking and r.tracking.alias), key=version)
    for report in reports:
        errors = [output for check in report.checks for output in check.outputs]
        worst = max(errors, key=lambda output: output.max_abs_error / output.budget)
        sizes = {str(check.sizes["batch"]) for check in report.checks}
        table.add_row(
            Path(report.checkpoint or "").stem,
            report.core,
            ", ".join(sorted(sizes, key=int)),
            f"{worst.max_abs_error:.1e}",
            f"{worst.budget:.1e}",
            f"{report.metrics['val_acc']:.3f}",
            str(version(report) or "-"),
            "champion" if report is champion else "-",
            "yes" if Path(report.path or "").exists() else "removed",
        )
    console = Console(width=123, record=True)
    console.print(table)
    console.save_svg(str(picture), title="onnxport")


def show_registry(root: Path, title: str) -> dict[str, str]:
    """Print the versions in the registry, and return which of them has which alias."""
    client = MlflowClient(tracking_uri(root))
    table = Table(title=title)
    for column in ("version", "run", "checkpoint", "val_acc", "alias"):
        table.add_column(column)
    aliases = client.get_registered_model("digits").aliases
    versions = client.search_model_versions("name = 'digits'")
    for each in sorted(versions, key=lambda each: int(each.version)):
        table.add_row(
            str(each.version),
            client.get_run(each.run_id).info.run_name,
            Path(each.tags["onnxport.checkpoint"]).stem,
            f"{float(each.tags['onnxport.metric.value']):.3f}",
            ", ".join(alias for alias, v in aliases.items() if int(v) == int(each.version)),
        )
    Console(width=100).print(table)
    return {alias: str(version) for alias, version in aliases.items()}


def train_again_and_go_back(root: Path) -> None:
    """A worse model does not become champion, a better one does, and a person may go back."""
    first = show_registry(root, "after the first training")["champion"]
    train(root, "worse", epochs=1)
    require(show_registry(root, "after a worse one")["champion"] == first, "it stays champion")
    train(root, "better", epochs=20)
    better = show_registry(root, "after a better one")
    require(better["champion"] != first, "the better one is champion")
    rollback("digits", tracking_uri=tracking_uri(root))
    after = show_registry(root, "after a rollback")
    require(after["champion"] == better["previous"], "the one before is champion again")


def require(ok: bool, what: str) -> None:
    """End with a sentence if something is not as it should be."""
    if not ok:
        raise SystemExit(f"not as it should be: {what}")


def version(report: ExportReport) -> int:
    """Return the version in the registry; 0 without one."""
    return (report.tracking and report.tracking.version) or 0


def main() -> None:
    """Run the main job."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="onnxport-demo-"))
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    export, checkpoints = train(root, "checkpoints", epochs=6)
    show(export.reports, root / "reports.svg")
    check_served_answers(root, checkpoints.best_model_path)
    train_again_and_go_back(root)
    print(f"models, reports and store: {root}")
    print(f"look around: {sys.executable} -m mlflow ui --backend-store-uri {tracking_uri(root)}")


if __name__ == "__main__":
    main()
