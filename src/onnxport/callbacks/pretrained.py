"""What belongs to a pretrained model beside its weights."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from onnxport.exporter.global_state import preserved_globals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn

__all__ = ["companions_in", "first_rows", "notes_of", "numbers_of", "without_autocast"]

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


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what was measured, without how long that took."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float))
        and name != "epoch"
        and not name.endswith(("_runtime", "_per_second"))
    }


@contextmanager
def without_autocast(module: nn.Module) -> Iterator[None]:
    """Let a module compute as its class says in the block, in the precision of its weights.

    ``accelerate`` puts autocast around ``forward``, on the instance, and keeps what was there.
    Source: ``accelerate.utils.other.extract_model_from_parallel``, 1.15.
    """
    given: dict[str, Any] = vars(module)
    wrapped: dict[str, Any] = {
        name: given[name] for name in ("forward", "_original_forward") if name in given
    }
    if "_original_forward" in wrapped:
        for name in wrapped:
            del given[name]
    try:
        yield
    finally:
        given.update(wrapped)
