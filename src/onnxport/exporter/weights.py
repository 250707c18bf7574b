"""One hash for one set of weights, the same in checkpoint, ONNX metadata and tracking server."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["weights_sha256"]


def weights_sha256(state: Mapping[str, Any]) -> str:
    """Hash the tensors of a ``state_dict``: names, dtypes, shapes and bytes, sorted by name.

    Args:
        state: A ``state_dict``; entries that are no tensors are left out.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import torch
        >>> weights_sha256({"w": torch.zeros(2)}) == weights_sha256({"w": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()
