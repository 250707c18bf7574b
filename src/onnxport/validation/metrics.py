"""Metrics of a validation that was run twice: is the second one worse than it may be?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from onnxport.report import MetricPair

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxport.config import Metrics
    from onnxport.report import Provenance

__all__ = ["compare_metrics"]

FLOOR = 1e-6
"""Differences below this are none, whatever is allowed: a loss of 1e-9 is rounding."""


def compare_metrics(
    torch: Mapping[str, float],
    onnx: Mapping[str, float],
    options: Metrics,
    origin: Provenance,
) -> tuple[MetricPair, ...]:
    """Compare what a validation has logged with PyTorch and with a model.

    Args:
        torch: Metrics with PyTorch, by name.
        onnx: Metrics with the model.
        options: How much worse they may be.
        origin: Which metric is monitored, and what is better.

    Example:
        >>> from onnxport.config import Metrics
        >>> from onnxport.report import Provenance
        >>> origin = Provenance(monitor="acc", mode="max")
        >>> [pair] = compare_metrics({"acc": 0.90}, {"acc": 0.85}, Metrics(), origin)
        >>> pair.ok, pair.reason
        (False, 'is worse by 0.05 (5.6%), and 1% is allowed')
    """
    names = dict.fromkeys((*torch, *onnx))
    found = []
    for name in names:
        one, other = torch.get(name, math.nan), onnx.get(name, math.nan)
        mode = origin.mode if name == origin.monitor else ""
        reason = _why_worse(one, other, options.allowed(name), mode)
        if name not in torch or name not in onnx:
            reason = f"was logged with {'PyTorch' if name in torch else 'the model'} alone"
        found.append(MetricPair(name=name, torch=one, onnx=other, ok=not reason, reason=reason))
    return tuple(found)


def _why_worse(torch: float, onnx: float, allowed: float, mode: str) -> str:
    """Return why a metric is worse than it may be; ``""``: it is not."""
    if not (math.isfinite(torch) and math.isfinite(onnx)):
        same = torch == onnx or (math.isnan(torch) and math.isnan(onnx))
        return "" if same or math.isinf(allowed) else "is not finite in one of the two"
    loss = {"min": onnx - torch, "max": torch - onnx}.get(mode, abs(onnx - torch))
    if loss <= max(FLOOR, allowed * abs(torch)):
        return ""
    part = f" ({100 * loss / abs(torch):.2g}%)" if torch else ""
    what = "is worse by" if mode else "differs by"
    return f"{what} {loss:.3g}{part}, and {100 * allowed:.3g}% is allowed"
