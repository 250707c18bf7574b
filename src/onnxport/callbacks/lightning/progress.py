"""What became of the last checkpoint, as an entry of Lightning's progress bar."""

from __future__ import annotations

import logging
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_status", "remove_status"]

logger = logging.getLogger(__name__)

_MARK = "_onnxport_status"


def add_status(trainer: Any, status: Callable[[], str]) -> None:
    """Let the progress bar, if there is one, show a status beside its metrics.

    Args:
        trainer: Its bar asks for what it shows with ``get_metrics``, in Lightning's own bars and in
            those of users.
        status: Gives it; ``""``: there is none yet.
    """
    bar = getattr(trainer, "progress_bar_callback", None)
    if bar is None or _MARK in vars(bar):
        return
    asked = bar.get_metrics

    @wraps(asked)
    def get_metrics(*args: Any, **kwargs: Any) -> Any:
        items = asked(*args, **kwargs)
        try:
            shown = {**items, "onnx": status()}
        except Exception:  # a bar of the user's own may show anything
            logger.debug("The progress bar takes no status.", exc_info=True)
            return items
        return shown if shown["onnx"] and "onnx" not in items else items

    vars(bar)[_MARK] = vars(bar).get("get_metrics")
    vars(bar)["get_metrics"] = get_metrics


def remove_status(trainer: Any) -> None:
    """Leave the progress bar as it was."""
    bar = getattr(trainer, "progress_bar_callback", None)
    if bar is None or _MARK not in vars(bar):
        return
    own = vars(bar).pop(_MARK)  # of the instance, if somebody has put one there before
    if own is None:
        vars(bar).pop("get_metrics", None)
    else:
        vars(bar)["get_metrics"] = own
