"""The run that a program has opened with MLflow's fluent API, which is looked at and left alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from onnxport.tracking.base import RunAddress

if TYPE_CHECKING:
    from onnxport.config import MLflow

__all__ = ["active_run"]


def active_run(options: MLflow) -> RunAddress | None:
    """Return the active run; ``None``: there is none.

    Args:
        options: How to track in it.
    """
    if "mlflow" not in sys.modules:  # nobody can have opened one
        return None
    import mlflow

    found = mlflow.active_run()
    if found is None:
        return None
    return RunAddress(
        uri=mlflow.get_tracking_uri(),
        run_id=found.info.run_id,
        experiment_id=found.info.experiment_id,
        options=options,
    )
