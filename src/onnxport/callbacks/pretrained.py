"""What belongs to a pretrained model beside its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from onnxport.exporter.global_state import preserved_globals

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["companions_in", "first_rows", "notes_of"]

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of configuration, tokenizers and processors in a checkpoint."""
_NO_COMPANIONS = frozenset({"trainer_state.json", "model.safetensors.index.json"})


def notes_of(module: nn.Module) -> dict[str, str]:
    """Say what the classes are called, where the module knows."""
    labels = getattr(getattr(module, "config", None), "id2label", None)
    return {"id2label": json.dumps(labels)} if labels else {}


def companions_in(folder: Path) -> list[str]:
    """Name the files of configuration, tokenizers and processors in a folder."""
    found = {file.name for pattern in _COMPANIONS for file in folder.glob(pattern)}
    return sorted(
        name for name in found if name not in _NO_COMPANIONS and not name.endswith(".onnx.json")
    )


def first_rows(loader: Any) -> Any:
    """Make a batch of the first two rows: where calls are compiled none can be watched."""
    if loader is None:
        return None
    with preserved_globals():
        rows = [loader.dataset[place] for place in range(2)]
        batch = loader.collate_fn(rows)
    return dict(batch) if hasattr(batch, "keys") else None
