"""How far ONNX Runtime may be from PyTorch: an error budget that is measured, not guessed.

PyTorch runs in float64 on the same rows. Its own float32 result is some distance from that, which
is what rounding costs this network on these rows; ONNX Runtime, which rounds in another order, may
be a small factor further away. A network that amplifies rounding gets a wide budget, a plain one a
narrow one, and a wrong weight fits in neither.

The budget is per element, relative to the element itself or, for small ones, to the typical size of
the output. The largest value would not do: one masked logit of -1e9 would allow anything.

A decision (a threshold, a top-k, a rounded value) that float32 takes otherwise than float64 is no
rounding: such an element does not widen the budget, and either result is right for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.config import Tolerance

__all__ = ["Reference", "make_references", "pinned_reference", "pooled_noise"]

FLOOR_EPS = 32
"""The least relative budget, in units of the dtype's epsilon: PyTorch's own error may be smaller
than usual by luck when there are few elements."""

DECISION = 1e-3
"""A relative error below this is never taken for another decision."""
DECISION_RATIO = 1e4
"""Nor is one below this many times the median error."""

TABLE_EPS = {torch.float32: 2e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative budgets where the module does not run in float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What one output should be.

    Args:
        expected: PyTorch's output, for shape and dtype.
        exact: The float64 output where there is one, else ``expected``.
        budget: Allowed absolute distance from ``exact``, in units of the output: for each element,
            or one number for all.
        source: ``"float64"``, ``"float32"``, ``"live"`` or ``"table"``.
    """

    expected: torch.Tensor
    exact: torch.Tensor
    budget: torch.Tensor | float
    source: str


def make_references(
    runs: Sequence[Sequence[torch.Tensor]],
    doubles: Sequence[Sequence[torch.Tensor] | None],
    tolerance: Tolerance,
) -> list[list[Reference]]:
    """Make the references of several runs of one module.

    PyTorch's relative error is pooled over the runs: one with few elements may be lucky.

    Args:
        runs: Outputs of each run, in the module's own precision.
        doubles: Outputs of the same run in float64; ``None`` where it does not run so.
        tolerance: Factor of the budget, or a tolerance that replaces it.

    Returns:
        For each run, one reference per output.
    """
    noise = pooled_noise(runs, doubles)
    return [
        [
            _reference(out, None if double is None else double[place], noise[place], tolerance)
            for place, out in enumerate(run)
        ]
        for run, double in zip(runs, doubles, strict=True)
    ]


def pooled_noise(
    runs: Sequence[Sequence[torch.Tensor]], doubles: Sequence[Sequence[torch.Tensor] | None]
) -> list[float]:
    """Return the largest relative error of PyTorch in any run; decisions are left out.

    Args:
        runs: Outputs of each run, in the module's own precision.
        doubles: Outputs of the same run in float64; ``None`` where it does not run so.

    Returns:
        For each output, dimensionless.
    """
    noise = [0.0] * max((len(run) for run in runs), default=0)
    for run, double in zip(runs, doubles, strict=True):
        for place, (out, exact) in enumerate(zip(run, double or (), strict=False)):
            if out.shape == exact.shape and out.numel():
                error = (_finite(out) - _finite(exact)).abs() / _magnitude(exact)
                noise[place] = max(noise[place], _largest_rounding(error.nan_to_num(nan=0.0)))
    return noise


def _largest_rounding(error: torch.Tensor) -> float:
    present = error[error > 0]
    if not present.numel():
        return 0.0
    limit = max(DECISION, DECISION_RATIO * float(present.median()))
    rounding = present[present <= limit]
    return float(rounding.max()) if rounding.numel() else float(present.max())


def pinned_reference(
    out: torch.Tensor, noise: float, tolerance: Tolerance, source: str = "live"
) -> Reference:
    """Make a reference of one run with other weights, where float64 is not run again.

    Args:
        out: The output; it is itself as far from float64 as PyTorch is.
        noise: PyTorch's relative error as it was measured before.
        tolerance: Factor of the budget, or a tolerance that replaces it.
        source: What the report says of it.
    """
    budget: torch.Tensor | float
    if tolerance.atol is not None or tolerance.rtol is not None:
        budget = (tolerance.atol or 0.0) + (tolerance.rtol or 0.0) * _finite(out).abs()
    elif not (out.is_floating_point() or out.is_complex()):
        budget = 0.0
    else:
        eps = torch.finfo(out.dtype).eps
        relative = (tolerance.factor + 1) * noise + FLOOR_EPS * eps
        if noise < eps / 64:
            relative = TABLE_EPS.get(out.dtype, 1e-3)
        budget = relative * _magnitude(out)
    return Reference(expected=out, exact=out, budget=budget, source=source)


def _reference(
    out: torch.Tensor, double: torch.Tensor | None, noise: float, tolerance: Tolerance
) -> Reference:
    exact = out if double is None or double.shape != out.shape else double
    source = "table" if exact is out else "float64"
    budget: torch.Tensor | float
    if tolerance.atol is not None or tolerance.rtol is not None:
        budget = (tolerance.atol or 0.0) + (tolerance.rtol or 0.0) * _finite(exact).abs()
    elif not (out.is_floating_point() or out.is_complex()):
        budget = 0.0  # an argmax that float64 decides otherwise is a tie: see parity
    else:
        eps = torch.finfo(out.dtype).eps
        relative = tolerance.factor * noise + FLOOR_EPS * eps
        if source == "table" or noise < eps / 64:
            # No float64 error at all over many values: the module computes in its own precision.
            relative = TABLE_EPS.get(out.dtype, 1e-3)
        budget = relative * _magnitude(exact)
    return Reference(expected=out, exact=exact, budget=budget, source=source)


def _magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The size of each element, but at least the typical size: the median of those not zero."""
    size = _finite(tensor).abs()
    present = size[size > 0]
    return size.clamp(min=float(present.median())) if present.numel() else size


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.to(torch.float64) if not tensor.is_complex() else tensor.abs().to(torch.float64)
    return wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
