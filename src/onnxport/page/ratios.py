"""Errors as parts of their budgets, on a logarithmic axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from onnxport.page.parts import log_axis
from onnxport.page.run import ratio_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnxport.report import ExportReport, OutputError

__all__ = ["drawn_ratio", "outputs_of", "ratio_axis", "true_ratio"]

_LEAST, _MOST = 1e-6, 1e3


def outputs_of(reports: Iterable[ExportReport]) -> Iterable[tuple[dict[str, int], OutputError]]:
    """Yield each comparison of an output, and the sizes at which it was made."""
    return (
        (check.sizes, one) for each in reports for check in each.checks for one in check.outputs
    )


def ratio_axis(drawn: Sequence[float]) -> dict[str, Any]:
    """Return an axis for parts of a budget, with as many ticks as can be read.

    Args:
        drawn: What is drawn along it, see :func:`drawn_ratio`.
    """
    return log_axis("part of the budget", drawn, lambda tick: f"{tick * 100:.4g} %")


def drawn_ratio(output: OutputError) -> float:
    """Return a ratio that a logarithmic axis can show."""
    return min(_MOST, max(_LEAST, ratio_of(output)))


def true_ratio(drawn: float) -> float:
    """Return a ratio in words' terms: nothing, or more than can be drawn, again."""
    return 0.0 if drawn <= _LEAST else math.inf if drawn >= _MOST else drawn
