"""Models that are owed, and of which a disk has refused the note: it is written once it can be.

Until then it lies beside the checkpoint, if that is on another disk.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from onnxport.callbacks import refused
from onnxport.callbacks.owed import is_owed, note

if TYPE_CHECKING:
    from pathlib import Path

    from onnxport.report import Provenance

__all__ = ["Unnoted"]

logger = logging.getLogger(__name__)


class Unnoted:
    """The debts of a run that are known to nobody else.

    Args:
        name: What follows the names of its models.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._origins: dict[Path, Provenance] = {}
        self._beside: dict[Path, Path] = {}
        self._removed: set[Path] = set()

    def owe(self, path: Path, origin: Provenance) -> None:
        """A model could not be made, and is owed.

        Args:
            path: Where it will lie.
            origin: Where its weights come from.
        """
        if origin.checkpoint is not None and not is_owed(path):
            self._origins[path] = origin

    def keep(self, path: Path, checkpoint: str) -> None:
        """The folder of a model takes no note of it, and may hold an older model of this name.

        Args:
            path: Of the model.
            checkpoint: Path of its checkpoint.
        """
        file = refused.keep(path, self._name, checkpoint)
        if file is not None:
            self.adopt(path, file)

    def adopt(self, path: Path, file: Path) -> None:
        """A note lies beside the checkpoint, perhaps since an earlier run.

        Args:
            path: Of the model.
            file: The note.
        """
        self._beside[path] = file
        self._removed.discard(path)

    def is_beside(self, path: Path) -> bool:
        """Tell whether what is owed is noted beside the checkpoint."""
        return path in self._beside

    def forget(self, path: Path) -> None:
        """The checkpoint is another one, or none."""
        self._origins.pop(path, None)

    def removed(self, path: Path) -> None:
        """No model of this name is wanted; a note stays while an older one has the name."""
        self.forget(path)
        if not refused.may_be_there(path):
            self.settle(path)
        elif path in self._beside:
            self._removed.add(path)

    def settle(self, path: Path) -> None:
        """Nothing is owed any more that is not noted where it belongs."""
        self.forget(path)
        self._removed.discard(path)
        file = self._beside.pop(path, None)
        if file is not None:
            try:
                file.unlink(missing_ok=True)
            except OSError:
                logger.debug("%s stays.", file, exc_info=True)

    def try_again(self) -> None:
        """Write the notes that can be written now; a folder that refuses one is asked no more."""
        refusing: set[Path] = set()
        for path, origin in list(self._origins.items()):
            if path.parent in refusing:
                continue
            if is_owed(path) or note(path, self._name, origin):
                self.settle(path)
            else:
                refusing.add(path.parent)
        for path in tuple(self._removed):  # a worker's thread may add to it
            if path.parent not in refusing and not refused.may_be_there(path):
                self.settle(path)
