"""What people decide about a registered model: promote a version, or go back."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from onnxport._optional import optional_import
from onnxport.errors import TrackingError
from onnxport.tracking.base import without_password
from onnxport.tracking.reachable import require_reachable
from onnxport.tracking.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["promote", "rollback"]

HEALTH_S = 10.0
"""How long a server may take for a sign of life, in seconds."""


def promote(
    name: str,
    version: int,
    *,
    alias: str = "champion",
    tracking_uri: str | None = None,
    pin: bool = True,
) -> int | None:
    """Give an alias to a version because a person says so; a rejected one is accepted again.

    Args:
        name: Of the registered model.
        version: Its number.
        alias: The alias.
        tracking_uri: Address of MLflow; default: ``MLFLOW_TRACKING_URI``.
        pin: No training may move the alias from then on, until somebody rolls back, or promotes
            without pinning.

    Returns:
        The version that had it before, or ``None``.

    Raises:
        MissingDependencyError: If MLflow is not installed.
        TrackingError: If there is no such version, or the server refuses or cannot be reached.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # an empty registry
        ...     promote("digits", 3, tracking_uri=f"sqlite:///{folder}/mlflow.db")
        Traceback (most recent call last):
        onnxport.errors.TrackingError: There is no version 3 of a model 'digits'.
    """
    with _registry(name, alias, tracking_uri) as registry:
        return registry.promote(version, pin=pin)


def rollback(
    name: str, *, alias: str = "champion", tracking_uri: str | None = None
) -> tuple[int, int]:
    """Give an alias back to the version that had it before; the one that loses it is rejected.

    A pin of that one ends.

    Args:
        name: Of the registered model.
        alias: The alias.
        tracking_uri: Address of MLflow; default: ``MLFLOW_TRACKING_URI``.

    Returns:
        The version that had it, and the one that has it now.

    Raises:
        MissingDependencyError: If MLflow is not installed.
        TrackingError: If there is none to go back to, or the server refuses or cannot be reached.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # an empty registry
        ...     rollback("digits", tracking_uri=f"sqlite:///{folder}/mlflow.db")
        Traceback (most recent call last):
        onnxport.errors.TrackingError: No version of 'digits' is 'champion'.
    """
    with _registry(name, alias, tracking_uri) as registry:
        return registry.rollback()


@contextlib.contextmanager
def _registry(name: str, alias: str, tracking_uri: str | None) -> Iterator[Registry]:
    """Open the registry of a server.

    Raises:
        TrackingError: If there is no address, or MLflow fails.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError("Where is MLflow? Give tracking_uri=, or set MLFLOW_TRACKING_URI.")
    with optional_import(extra="mlflow", needed_for="The model registry"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    asked = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    try:
        require_reachable(asked, HEALTH_S)  # MLflow itself would try for minutes
    except TrackingError as error:
        shown = without_password(asked)
        raise TrackingError(f"The server at {shown} is not used: {error}.") from error
    try:
        yield Registry(MlflowClient(tracking_uri=uri), name, alias)
    except MlflowException as error:
        raise TrackingError(f"MLflow refuses: {error}") from error
