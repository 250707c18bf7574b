"""Read the tensors of files of ``safetensors``, which hold tensors and nothing that is executed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from onnxport._files import read_small, require_inside
from onnxport._optional import optional_import

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["read_safetensors"]


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a file, or of the files that an index names.

    Args:
        path: ``*.safetensors``, or ``*.safetensors.index.json`` beside its files.

    Raises:
        MissingDependencyError: If safetensors is not installed.
        OSError: If a file cannot be read.
        ValueError: If the index is none, or names files elsewhere.
    """
    if not path.name.endswith(".json"):
        return _read(path)
    places = json.loads(read_small(path))["weight_map"].values()
    found: dict[str, torch.Tensor] = {}
    for name in sorted(set(places)):
        if "/" in name or "\\" in name:
            raise ValueError(f"it names a file elsewhere, {name!r}")
        require_inside(path.with_name(name))
        found |= _read(path.with_name(name))
    return found


def _read(path: Path) -> dict[str, torch.Tensor]:
    with optional_import(extra="transformers", needed_for="Reading *.safetensors"):
        from safetensors import safe_open
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
