"""Real rows at other sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnxport.signature import Axes

__all__ = ["current_sizes", "lower", "negate", "resize", "scale", "shuffle", "take"]

SCALE = 8.0
"""By how much scaled rows are larger: enough to cross a threshold that real rows stay below."""


TIE_BREAK = 2**-6
"""By which part of itself a repeat is smaller than what it repeats."""


def take(tensor: torch.Tensor, axes: Sequence[int], index: torch.Tensor) -> torch.Tensor:
    """Index several axes of a tensor with the same index of shape ``(n,)``."""
    for axis in axes:
        tensor = tensor.index_select(axis, index)
    return tensor.contiguous()


def resize(
    tensors: Sequence[torch.Tensor], axes: Axes, sizes: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """Repeat or cut real rows until each named dimension has the wanted size.

    Repeats are a little smaller than what they repeat: equal numbers would be ties, which a sort or
    a top-k may order in any way.

    Args:
        tensors: One example, any shapes.
        axes: The dynamic axes of each tensor.
        sizes: Wanted size per dimension; dimensions that are not named keep their size.
    """
    resized = []
    for tensor, dims in zip(tensors, axes, strict=True):
        for axis, name in dims.items():
            if name in sizes and tensor.shape[axis] not in {0, sizes[name]}:
                tensor = _repeated(tensor, axis, sizes[name])  # noqa: PLW2901
        resized.append(tensor.contiguous())
    return tuple(resized)


def _repeated(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    places = torch.arange(size)
    repeated = tensor.index_select(axis, places % tensor.shape[axis])
    if size <= tensor.shape[axis] or not _has_fractions(tensor):
        return repeated
    smaller = 1 / (1 + TIE_BREAK * (places // tensor.shape[axis]))
    shape = [size if one == axis else 1 for one in range(tensor.ndim)]
    return repeated * smaller.reshape(shape).to(tensor.dtype)


def _has_fractions(tensor: torch.Tensor) -> bool:
    """Tell measured numbers from masks, counts and indices that are kept as floats."""
    return tensor.is_floating_point() and bool((tensor != tensor.round()).any())


def current_sizes(tensors: Sequence[torch.Tensor], axes: Axes) -> dict[str, int]:
    """Return the size of each named dimension."""
    return {
        name: tensor.shape[axis]
        for tensor, dims in zip(tensors, axes, strict=True)
        for axis, name in dims.items()
    }


def negate(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Flip the sign of all floating-point tensors; others stay."""
    return tuple(-tensor if tensor.is_floating_point() else tensor for tensor in tensors)


def scale(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Make all floating-point values larger; others stay."""
    return tuple(tensor * SCALE if tensor.is_floating_point() else tensor for tensor in tensors)


def lower(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Make the whole numbers of the lowest row 0 or 1: a short row beside a long one.

    The first entries of a table, the shortest lengths. All rows at once would be no real data, and
    the largest row stays because sizes may follow from it.
    """
    return tuple(_lowest_lowered(tensor) if _counts(tensor) else tensor for tensor in tensors)


def _counts(tensor: torch.Tensor) -> bool:
    other = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool
    return tensor.ndim > 0 and tensor.numel() > 0 and not other


def _lowest_lowered(tensor: torch.Tensor) -> torch.Tensor:
    lowest = int(tensor.reshape(len(tensor), -1).sum(1).argmin())
    lowered = tensor.clone()
    lowered[lowest] = tensor[lowest].clamp(max=1)
    return lowered


def shuffle(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Turn the order of the entries of each row around; values stay what they are."""
    return tuple(tensor.flip(-1) if tensor.ndim > 1 else tensor for tensor in tensors)
