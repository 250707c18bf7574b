"""Options that adapters share."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from onnxport.config import Background, MLflow
from onnxport.errors import ConfigurationError

if TYPE_CHECKING:
    from onnxport.exporter.target import Target

__all__ = [
    "DRAIN_AFTER_ERROR_S",
    "AnyTarget",
    "Preflight",
    "read_background",
    "read_mlflow",
    "read_preflight",
    "read_targets",
]

DRAIN_AFTER_ERROR_S = 15.0
"""How long models are waited for when training ended by an error or by Ctrl-C."""

AnyTarget = str | Callable[..., Any] | Mapping[str, str | Callable[..., Any]] | None
"""One target, or several by name; ``None``: found by watching."""


def read_targets(target: AnyTarget) -> dict[str, Target | None]:
    """Return what to export by what follows the names of the models; one target has ``""``.

    Raises:
        ConfigurationError: If it is no target, or a name cannot be part of a file's name.
    """
    if not isinstance(target, Mapping):
        return {"": _checked(target)}
    wrong = [name for name in target if not re.fullmatch(r"[\w.-]+", str(name))]
    if wrong or not target:
        raise ConfigurationError(
            "target= as a mapping must have names of letters, digits, '_', '.' and '-', which "
            f"become part of the models' names; got {wrong or dict(target)!r}."
        )
    return {f"-{name}": _checked(one) for name, one in target.items()}


def _checked(target: Any) -> Target | None:
    if target is None or isinstance(target, str) or callable(target):
        known: Target | None = target
        return known
    raise ConfigurationError(
        "target= must be the name of a submodule or method, a callable that makes a module of the "
        f"trained one, or a mapping of names to these; got {target!r}."
    )


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


BACKGROUND_VARIABLE = "ONNXPORT_BACKGROUND"
"""Environment variable; ``0``: make models in the training process unless the code says how."""

Preflight = Literal["warn", "raise"] | None
"""What a module that does not export leads to before there is a checkpoint; ``None``: not tried."""


def read_background(background: bool | Background) -> Background | None:
    """Return how the worker lives; ``None``: there is none.

    Raises:
        ConfigurationError: If it is none of the choices.
    """
    if isinstance(background, Background):
        return background
    if background is not True and background is not False:
        raise ConfigurationError(
            f"background must be True, False or Background(...); got {background!r}."
        )
    wanted = background and os.environ.get(BACKGROUND_VARIABLE) != "0"
    # Weights and sockets are handed over as only Unix can.
    return Background() if wanted and hasattr(socket, "AF_UNIX") else None


def read_preflight(
    preflight: bool | Literal["raise"] | None, background: Background | None
) -> Preflight:
    """Return what happens when the export before the first checkpoint fails.

    Raises:
        ConfigurationError: If it is none of the choices.
    """
    if not (preflight is None or preflight is True or preflight is False or preflight == "raise"):
        raise ConfigurationError(
            f"preflight must be True, False, None or 'raise'; got {preflight!r}."
        )
    if preflight == "raise":
        return "raise"
    wanted = background is not None if preflight is None else preflight
    return "warn" if wanted else None
