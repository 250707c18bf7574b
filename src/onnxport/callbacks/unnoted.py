"""Models that are owed, and of which a disk has refused the note: it is written once it can be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.callbacks.owed import is_owed, note
from onnxport.exporter.checkpoint_file import is_checkpoint

if TYPE_CHECKING:
    from onnxport.report import Provenance

__all__ = ["Unnoted"]


class Unnoted:
    """The debts of a run that are known to nobody else.

    Args:
        name: What follows the names of its models.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._origins: dict[Path, Provenance] = {}

    def owe(self, path: Path, origin: Provenance) -> None:
        """A model could not be made, and is owed.

        Args:
            path: Where it will lie.
            origin: Where its weights come from.
        """
        if origin.checkpoint is not None and not is_owed(path):
            self._origins[path] = origin

    def forget(self, path: Path) -> None:
        """The checkpoint is another one, or is removed."""
        self._origins.pop(path, None)

    def try_again(self) -> None:
        """Write the notes that can be written now."""
        for path, origin in list(self._origins.items()):
            gone = not is_checkpoint(Path(str(origin.checkpoint)))
            if gone or is_owed(path) or note(path, self._name, origin):
                self.forget(path)
