"""The run of a tracking server that models belong to, where a training has none of its own."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.tracking.base import RunAddress

if TYPE_CHECKING:
    from onnxport.config import MLflow

__all__ = ["own_run"]


def own_run(options: MLflow, root: str | os.PathLike[str]) -> RunAddress:
    """Return a run that is opened with its first model.

    Args:
        options: How to track.
        root: Folder for an sqlite database where there is no other address.
    """
    fit = secrets.token_hex(16)
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return RunAddress(uri=uri, fit=fit, options=options)
    folder = Path(root).resolve()
    return RunAddress(
        uri=f"sqlite:///{folder / 'mlflow.db'}",
        fit=fit,
        artifact_root=(folder / "mlartifacts").as_uri(),
        options=options,
    )
