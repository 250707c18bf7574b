"""Which models are still to be made: noted beside the checkpoint until each of them is there.

A training run may be killed, or may not wait for its last models. Whoever comes next finds what is
owed, and makes it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["note", "owed", "settle"]

logger = logging.getLogger(__name__)

_SUFFIX = ".pending"


def note(model: Path, name: str, origin: Provenance) -> None:
    """Note that a checkpoint's model is on its way; a disk that refuses is no reason to stop.

    Args:
        model: Where the model will lie.
        name: Of the target, as it is part of the model's name.
        origin: Where the weights come from; without a checkpoint there is nothing to note.
    """
    if origin.checkpoint is None:
        return
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        content = {"name": name, "origin": asdict(origin)}
        _marker(model).write_text(json.dumps(content), encoding="utf-8")
    except (OSError, ValueError, TypeError):
        logger.debug("%s is not noted as owed.", model, exc_info=True)


def settle(model: Path) -> None:
    """The model is there, or will never be."""
    try:
        _marker(model).unlink(missing_ok=True)
    except OSError:  # the folder is no folder, or not ours to write to any more
        logger.debug("The marker of %s stays.", model, exc_info=True)


def owed(folders: Iterable[Path], name: str) -> Iterator[tuple[Path, Provenance]]:
    """Yield the models that are owed for checkpoints that are still there.

    Args:
        folders: Where to look, and below.
        name: Of the target.
    """
    for folder in dict.fromkeys(folders):
        for marker in sorted(folder.rglob(f".*{_SUFFIX}")) if folder.is_dir() else ():
            found = _read(marker)
            if found is None or found[0] != name:
                continue
            origin = found[1]
            if Path(origin.checkpoint or "").is_file():
                yield marker.with_name(marker.name[1 : -len(_SUFFIX)]), origin
            else:
                marker.unlink(missing_ok=True)


def _marker(model: Path) -> Path:
    return model.with_name(f".{model.name}{_SUFFIX}")


def _read(marker: Path) -> tuple[str, Provenance] | None:
    """Read a marker; one that was half-written says nothing."""
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        return content["name"], Provenance(**content["origin"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
