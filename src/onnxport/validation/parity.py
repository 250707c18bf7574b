"""Compare ONNX Runtime's outputs with PyTorch's; strict on shape, dtype, NaN and infinity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from onnxport.report import OutputError

if TYPE_CHECKING:
    from onnxport.validation.budget import Reference

__all__ = ["compare"]


def compare(name: str, actual: torch.Tensor, reference: Reference) -> OutputError:
    """Compare one output.

    Shape and dtype must match exactly; NaN and infinities must sit at the same places. The pass
    condition is written positively, so that a NaN difference fails.

    Args:
        name: Name of the output.
        actual: ONNX Runtime's output.
        reference: What it should be.
    """
    reason = _structural(actual, reference.expected)
    if reason:
        budget = float(torch.as_tensor(reference.budget).max()) if actual.numel() else 0.0
        return OutputError(
            name=name, max_abs_error=math.inf, budget=budget, ok=False, reason=reason
        )
    distance = _distance(actual, reference.exact, reference.expected)
    budget_of = torch.as_tensor(reference.budget, dtype=torch.float64).expand_as(distance)
    distance = _to_either(distance, budget_of, actual, reference)
    error, budget = _worst(distance, budget_of)
    within = bool((distance <= budget_of).all())
    return OutputError(
        name=name,
        max_abs_error=error,
        budget=budget,
        ok=within,
        reason="" if within else f"differs by {error:.3g}, allowed is {budget:.3g}",
    )


def _worst(distance: torch.Tensor, budget: torch.Tensor) -> tuple[float, float]:
    """Return distance and budget of the element that uses most of its budget."""
    if not distance.numel():
        return 0.0, 0.0
    used = torch.where(distance > 0, distance / budget, 0.0).nan_to_num(nan=math.inf)
    most = used == used.max()  # several where there is no budget at all: the largest of them
    place = int(torch.where(most, distance + budget.nan_to_num(), -1.0).argmax())
    return float(distance.reshape(-1)[place]), float(budget.reshape(-1)[place])


def _structural(actual: torch.Tensor, expected: torch.Tensor) -> str:
    if actual.dtype != expected.dtype:
        return f"is {_name(actual.dtype)}, PyTorch gives {_name(expected.dtype)}"
    if actual.shape != expected.shape:
        return f"has shape {tuple(actual.shape)}, PyTorch gives {tuple(expected.shape)}"
    if expected.is_floating_point() or expected.is_complex():
        if not torch.equal(actual.isnan(), expected.isnan()):
            return "has NaN at other places than PyTorch"
        infinite = expected.isinf()
        if not torch.equal(actual.isinf(), infinite) or not torch.equal(
            actual[infinite], expected[infinite]
        ):
            return "has infinities at other places than PyTorch"
    return ""


def _distance(actual: torch.Tensor, exact: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the absolute difference of each element; 0 where both are the same infinity or NaN."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    if not (expected.is_floating_point() or expected.is_complex()):
        # Where float64 decides otherwise, either value is right; elsewhere only one is.
        wrong = (actual != expected) & (actual != exact)
        # Beyond 2**53 neighbours are one number in float64.
        difference = (actual.to(wide) - expected.to(wide)).abs().clamp(min=1.0)
        return torch.where(wrong, difference, 0.0)
    # Where only float64 has no number, PyTorch's own result counts.
    target = torch.where(exact.isfinite(), exact.to(wide), expected.to(wide))
    return torch.where(expected.isfinite(), (actual.to(wide) - target).abs(), 0.0)


def _to_either(
    distance: torch.Tensor, budget: torch.Tensor, actual: torch.Tensor, reference: Reference
) -> torch.Tensor:
    """Where PyTorch itself is past the budget float64 has decided otherwise: either is right."""
    own = _distance(reference.expected, reference.exact, reference.expected)
    to_own = _distance(actual, reference.expected, reference.expected)
    return torch.where(own > budget, torch.minimum(distance, to_own), distance)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
