"""What belongs to a pretrained model beside its weights."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.training import never_raises
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.tied import tied_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

__all__ = [
    "Dated",
    "companions_in",
    "first_rows",
    "notes_of",
    "numbers_of",
    "without_autocast",
]

logger = logging.getLogger(__name__)

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of configuration, tokenizers and processors in a checkpoint."""
_NO_COMPANIONS = frozenset({"trainer_state.json", "model.safetensors.index.json"})


def notes_of(module: nn.Module) -> dict[str, str]:
    """Say what the classes are called, where the module knows; and which weights are one."""
    labels = getattr(getattr(module, "config", None), "id2label", None)
    notes = {"id2label": json.dumps(labels, default=str)} if labels else {}
    tied = tied_names(module)  # a file has each once, and its hash would be another one
    return notes | ({"tied": json.dumps(tied)} if tied else {})


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
    try:
        with preserved_globals():
            batch = loader.collate_fn([loader.dataset[place] for place in range(2)])
    except Exception:  # a user's, which may have no places, or fewer rows
        logger.debug("No batch could be made of the first rows", exc_info=True)
        return None
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


class Dated:
    """Keeps the times of folders that are checkpoints, by which a framework tells the oldest.

    Our own files come later, and must not make one look newer than it is. The times are put right
    where the framework is about to look at them: after it has written its state, the last file.

    Args:
        state: Has ``save_to_json``.
        folders: Gives the folders.
    """

    def __init__(self, state: Any, folders: Callable[[], Iterable[Path]]) -> None:
        self._state, self._folders = state, folders
        self._write = state.save_to_json
        state.save_to_json = self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the state, and put the times right."""
        self._write(*args, **kwargs)
        with never_raises("keeping the times of checkpoints"):
            for folder in self._folders():
                _date(folder)

    def stop(self) -> None:
        """Leave the state as it was."""
        vars(self._state).pop("save_to_json", None)


def _date(folder: Path) -> None:
    """Give a folder the time of the newest file in it that is none of ours."""
    with suppress(OSError, ValueError):  # it is gone; or there is nothing in it
        files = (file for file in folder.iterdir() if not _is_ours(file.name))
        newest = max(file.stat().st_mtime_ns for file in files)
        os.utime(folder, ns=(newest, newest))


def _is_ours(name: str) -> bool:
    return name.startswith(".") or ".onnx" in name
