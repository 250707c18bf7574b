"""A module as the champion of a registry, without a training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnxport
from onnxport.config import MLflow
from onnxport.report import Provenance
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.mlflow import MlflowTracker

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn


def register(
    store: str, folder: Path, module: nn.Module, example: dict[str, torch.Tensor], **options: Any
) -> None:
    """Export a module, and make it the champion of ``"scored"``.

    Args:
        store: Address of MLflow's database.
        folder: Where the model and MLflow's artifacts go.
        module: In eval mode.
        example: Inputs by name.
        options: Of ``onnxport.export``.
    """
    path = folder / "model.onnx"
    called = onnxport.Example((), dict(example))
    report = onnxport.export(module, called, path, core="trace", **options)
    model = Model.of_file(path, replace(report, global_step=1), Provenance())
    assert model is not None
    root = (folder / "artifacts").as_uri()
    address = RunAddress(uri=store, artifact_root=root, options=MLflow(register="scored"))
    MlflowTracker(address).publish(model, last=False)
