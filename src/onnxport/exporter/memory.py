"""Remember between runs which rung won for a kind of model, so that it is tried first."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch

from onnxport._files import read_small
from onnxport.errors import PublishError
from onnxport.exporter.ladder import Rung, named_rung
from onnxport.exporter.writer import write_text

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RungMemory", "model_key"]

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNXPORT_CACHE_DIR"
"""Environment variable with the folder of the cache; default: the user's cache folder."""


class RungMemory:
    """One small file per kind of model; a lost or broken one costs an attempt, nothing else.

    Args:
        folder: Where the files lie; default: ``$ONNXPORT_CACHE_DIR``, else the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = _default_folder() if folder is None else folder

    def recall(self, key: str, core: str) -> Rung | None:
        """Return the rung that won last, if the ladder of this ``core`` option has it."""
        try:
            known = json.loads(read_small(self._file(key, core)))
            return named_rung(core, known["rung"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def remember(self, key: str, core: str, rung: Rung) -> None:
        """Keep which rung won."""
        file = self._file(key, core)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"rung": rung.key}))
        except (OSError, PublishError) as error:
            logger.debug("The winning rung was not remembered: %s", error)

    def _file(self, key: str, core: str) -> Path:
        return self._folder / f"{key}-{core}.json"


def model_key(module: nn.Module) -> str:
    """Return a name for a kind of model: its classes and torch's version, not its sizes."""
    kinds = [
        f"{name}:{type(submodule).__module__}.{type(submodule).__qualname__}"
        for name, submodule in module.named_modules()
    ]
    text = "\n".join([torch.__version__, *kinds])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _default_folder() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(platformdirs.user_cache_dir("onnxport")) / "rungs"
