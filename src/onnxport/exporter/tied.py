"""Weights that are one tensor under several names: ``safetensors`` files have each tensor once."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

__all__ = ["tied_names", "with_tied"]


def tied_names(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of each tensor that has several in a module's ``state_dict``.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = net.append(net[0])
        >>> tied_names(net)
        [('0.weight', '2.weight')]
    """
    names: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, value in module.state_dict().items():
        if type(value) is torch.Tensor and value.device.type != "meta" and value.numel():
            place = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
            names[place].append(name)
    return [tuple(each) for each in names.values() if len(each) > 1]


def with_tied(state: Mapping[str, Any], tied: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return weights that may have each tensor once, under all of its names.

    Args:
        state: What is in a file.
        tied: See :func:`tied_names`.
    """
    whole = dict(state)
    for names in tied:
        known = next((name for name in names if name in state), None)
        if known is not None:
            whole |= {name: state[known] for name in names if name not in state}
    return whole
