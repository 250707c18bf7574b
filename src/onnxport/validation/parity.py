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
    expected = reference.expected
    reason = _structural(actual, expected)
    error = math.inf
    if not reason:
        error = _distance(actual, reference.exact, expected)
        if not error <= reference.budget:
            reason = f"differs by {error:.3g}, allowed is {reference.budget:.3g}"
    return OutputError(
        name=name,
        max_abs_error=error,
        budget=reference.budget,
        ok=not reason,
        reason=reason,
    )


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


def _distance(actual: torch.Tensor, exact: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference over finite places."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    if not (expected.is_floating_point() or expected.is_complex()):
        # Where float64 decides otherwise, either value is right; elsewhere only one is.
        wrong = (actual != expected) & (actual != exact)
        if not bool(wrong.any()):
            return 0.0
        distance = (actual[wrong].to(wide) - expected[wrong].to(wide)).abs().max()
        return max(float(distance), 1.0)  # beyond 2**53 neighbours are one number in float64
    finite = expected.isfinite()
    if not bool(finite.any()):
        return 0.0
    # Where only float64 has no number, PyTorch's own result counts.
    target = torch.where(exact.isfinite(), exact.to(wide), expected.to(wide))
    return float((actual[finite].to(wide) - target[finite]).abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
