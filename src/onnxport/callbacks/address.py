"""The run of a tracking server that models belong to, where a training has none of its own."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.tracking.base import RunAddress
from onnxport.tracking.fluent import active_run

if TYPE_CHECKING:
    from onnxport.config import MLflow

__all__ = ["active_or_own_run", "own_run"]


def active_or_own_run(
    mlflow: tuple[str, MLflow] | None, root: str | os.PathLike[str]
) -> RunAddress | None:
    """Find the run that is open in this process; or one of our own, if asked for.

    Args:
        mlflow: How eager to track, and the options; ``None``: not at all.
        root: See :func:`own_run`.
    """
    if mlflow is None:
        return None
    eagerness, options = mlflow
    found = active_run(options)
    if found is not None:
        return found
    return None if eagerness == "auto" else own_run(options, root)


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
