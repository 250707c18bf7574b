"""Which checkpoint is the best, where a framework keeps no such list."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnxport._files import is_there

if TYPE_CHECKING:
    from onnxport.report import Provenance

__all__ = ["Scores"]


class Scores:
    """Remembers where saved weights come from.

    Args:
        monitor: Name of the metric that decides, or ``None``.
        mode: ``"min"`` or ``"max"`` for that metric.

    Example:
        >>> from onnxport.callbacks.scores import Scores
        >>> Scores("val_loss").best is None
        True
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "min") -> None:
        self._monitor, self._mode = monitor, mode
        self._saved: dict[str, Provenance] = {}

    def add(self, origin: Provenance) -> None:
        """A checkpoint was saved."""
        path = str(origin.checkpoint)
        self._saved.pop(path, None)  # the last one is the one that was saved last
        self._saved[path] = origin

    @property
    def best(self) -> Provenance | None:
        """The one with the best score, without scores the last one; of those that are there."""
        there = [one for path, one in self._saved.items() if is_there(Path(path))]
        scored = [one for one in there if not math.isnan(self._score(one))]
        if not scored:
            return there[-1] if there else None
        return (max if self._mode == "max" else min)(scored, key=self._score)

    def _score(self, origin: Provenance) -> float:
        return origin.metrics.get(self._monitor or "", math.nan)
