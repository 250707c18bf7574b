"""Which metrics were measured with the weights that are saved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Measured"]


class Measured:
    """Remembers what each validation measured, and after how many steps.

    A trainer keeps the metrics of the last validation while training goes on: a checkpoint in the
    middle of an epoch is saved beside metrics of other weights.

    Example:
        >>> measured = Measured()
        >>> measured.begin({"train_loss": 2.0})
        >>> measured.end({"train_loss": 2.0, "acc": 0.5}, step=10)
        >>> measured.fresh({"train_loss": 1.5, "acc": 0.5}, step=15)
        {'train_loss': 1.5}
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._names: set[str] = set()
        self._at: dict[int, dict[str, float]] = {}

    def begin(self, metrics: Mapping[str, Any]) -> None:
        """A validation begins."""
        self._before = _floats(metrics)

    def end(self, metrics: Mapping[str, Any], step: int) -> None:
        """A validation ended after this many steps: it measured what is new or changed."""
        now = _floats(metrics)
        self._names |= {name for name in now if not _same(now[name], self._before.get(name))}
        self._at[step] = {name: now[name] for name in self._names & now.keys()}

    def fresh(self, metrics: Mapping[str, Any], step: int) -> dict[str, float]:
        """Return the metrics that belong to weights that were trained for this many steps."""
        known = self._at.get(step, {})
        return {
            name: value
            for name, value in _floats(metrics).items()
            if name not in self._names or name in known
        }

    def at(self, name: str, step: int | None, otherwise: float) -> float:
        """Return what was measured after this many steps.

        Args:
            name: Name of the metric.
            step: Number of steps; ``None``: unknown.
            otherwise: The answer for what no validation measures, and for steps of an earlier fit.
        """
        if name not in self._names or step is None or step < min(self._at):
            return otherwise
        return self._at.get(step, {}).get(name, math.nan)


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _same(value: float, before: float | None) -> bool:
    return before is not None and (value == before or (math.isnan(value) and math.isnan(before)))
