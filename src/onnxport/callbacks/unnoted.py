"""Models that are owed, and of which a disk has refused the note: it is written once it can be.

Until then it lies beside the checkpoint, if that is on another disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.callbacks import refused
from onnxport.callbacks.owed import is_owed, note
from onnxport.exporter.checkpoint_file import is_checkpoint

if TYPE_CHECKING:
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
        self._beside: dict[Path, tuple[Path, Path]] = {}

    def owe(self, path: Path, origin: Provenance) -> None:
        """A model could not be made, and is owed.

        Args:
            path: Where it will lie.
            origin: Where its weights come from.
        """
        if origin.checkpoint is not None and not is_owed(path):
            self._origins[path] = origin

    def refused(self, path: Path, checkpoint: str) -> None:
        """The folder of a model takes no note of it, and may hold an older model of this name.

        Args:
            path: Of the model.
            checkpoint: Path of its checkpoint.
        """
        file = refused.keep(path, self._name, checkpoint)
        if file is not None:
            self._beside[path] = (file, Path(checkpoint))

    def is_beside(self, path: Path) -> bool:
        """Tell whether what is owed is noted beside the checkpoint."""
        return path in self._beside

    def forget(self, path: Path) -> None:
        """The checkpoint is another one, or is removed."""
        self._origins.pop(path, None)

    def settle(self, path: Path) -> None:
        """Nothing is owed any more that is not noted where it belongs."""
        self.forget(path)
        if path in self._beside:
            file, _ = self._beside.pop(path)
            try:
                file.unlink(missing_ok=True)
            except OSError:
                logger.debug("%s stays.", file, exc_info=True)

    def try_again(self) -> None:
        """Write the notes that can be written now."""
        for path, origin in list(self._origins.items()):
            gone = not is_checkpoint(Path(str(origin.checkpoint)))
            if not gone and (is_owed(path) or note(path, self._name, origin)):
                self.settle(path)
            elif gone:
                self.forget(path)
        for path, (_, checkpoint) in list(self._beside.items()):
            if is_owed(path) or not (is_checkpoint(checkpoint) or _may_be_there(path)):
                self.settle(path)


def _may_be_there(path: Path) -> bool:
    """Tell whether a file is there, or the disk does not say."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        logger.debug("Whether there is %s is not known.", path, exc_info=True)
    return True
