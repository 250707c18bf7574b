"""Options that adapters share."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from onnxport.config import MLflow
from onnxport.errors import ConfigurationError

__all__ = ["read_mlflow"]


def read_mlflow(
    mlflow: Literal["auto"] | bool | MLflow, register: str | None
) -> tuple[str, MLflow] | None:
    """Return how eager to track (``"auto"`` or ``"always"``) and the options; ``None``: not.

    Raises:
        ConfigurationError: If the arguments contradict each other.
    """
    if mlflow is False:
        if register is not None:
            raise ConfigurationError(
                f"register={register!r} needs MLflow, and mlflow=False. Leave one of them out."
            )
        return None
    if not (mlflow == "auto" or mlflow is True or isinstance(mlflow, MLflow)):
        raise ConfigurationError(
            f"mlflow must be 'auto', True, False or MLflow(...); got {mlflow!r}."
        )
    options = mlflow if isinstance(mlflow, MLflow) else MLflow()
    if register is not None:
        options = replace(options, register=register)
    eager = mlflow is True or options.tracking_uri is not None or options.register is not None
    if eager:
        from onnxport.tracking.mlflow import require_mlflow

        require_mlflow()
    return ("always" if eager else "auto"), options
