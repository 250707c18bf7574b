"""Models lose their names before their checkpoints change, or as soon as the disk lets them."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from onnxport._events import event
from onnxport._files import identity_of
from onnxport.callbacks.owed import is_owed, note_anew
from onnxport.callbacks.paths import is_model_of
from onnxport.exporter.ownership import cannot_be_read
from onnxport.exporter.writer import remove_model, withdraw_model, withdraw_staged

__all__ = ["Withdrawals"]

logger = logging.getLogger(__name__)


class Withdrawals:
    """The models of a run whose checkpoints change, or are gone.

    Args:
        name: What follows the names of the models.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._withdrawn: dict[Path, bool] = {}
        self._published: dict[Path, tuple[int, ...]] = {}
        self._stale: set[Path] = set()
        self._free: set[Path] = set()
        self._said: set[Path] = set()

    def published(self, path: Path) -> None:
        """A proven model is there now: it is ours, also if the disk does not let it be read."""
        self._stale.discard(path)
        self._said.discard(path)
        with suppress(OSError):  # it is gone already
            self._published[path] = identity_of(path)

    def has_published(self, path: Path) -> bool:
        """Tell whether the file is a model that this run has proven."""
        with suppress(OSError):
            return self._published.get(path) == identity_of(path)
        return False

    def withdraw(self, path: Path, checkpoint: str) -> bool:
        """A checkpoint is about to change, or to be removed: its model is not what has its name.

        Args:
            path: The model; files that are none of ours stay.
            checkpoint: The checkpoint.

        Returns:
            Whether whoever comes next learns of it in the folder of the model.
        """
        ours, noted = False, True
        self._stale.discard(path)
        try:
            known = self._is_known(path)
            # A disk may fail once; what is there and says nothing of itself is asked twice.
            tries = 2 if path.exists() else 1
            ours = known or any(is_model_of(path, Path(checkpoint)) for _ in range(tries))
            # Somebody else's files need no note; of what cannot be read nobody knows.
            noted = ours or not cannot_be_read(path)
            if ours or not path.exists():
                noted = note_anew(path, self._name, checkpoint)
                withdraw_staged(path)
            if ours:
                withdraw_model(path, known=known)
            if path.exists():
                self._free.discard(path)
            else:
                self._free.add(path)
        except OSError as error:
            self._say(path, f"{path} may hold older weights than {checkpoint}: {error}")
            noted = is_owed(path)
        else:
            self._said.discard(path)
            if ours:
                event("model.withdrawn", model=path, checkpoint=checkpoint)
        self._withdrawn[path] = ours
        return noted

    def _is_known(self, path: Path) -> bool:
        """Tell whether a file is ours, also if it cannot be read.

        It is if this run has published it, or if the name was free when a model was begun: the
        process that made one may have died, or have failed, after it was published.
        """
        return self.has_published(path) or (path in self._free and cannot_be_read(path))

    def _say(self, path: Path, text: str) -> None:
        """Say once what stays although it should not; a disk refuses the same at each save."""
        level = logging.DEBUG if path in self._said else logging.WARNING
        self._said.add(path)
        logger.log(level, "%s", text)

    def forget(self, path: Path) -> bool | None:
        """Tell whether a model was withdrawn that was of its checkpoint, for the last time.

        Returns:
            ``None`` if nobody has tried to withdraw it.
        """
        return self._withdrawn.pop(path, None)

    def remove(self, path: Path, *, again: bool = True) -> None:
        """Remove a model of ours.

        Args:
            path: The model; files that are none of ours stay.
            again: If the disk refuses it, it is tried again later; no other model of this name may
                be on its way then.
        """
        try:
            self._remove(path)
        except OSError as error:
            self._say(path, f"{path} is of older weights, or of none, and stays: {error}")
            if again:
                self._stale.add(path)

    def try_again(self) -> None:
        """Remove what the disk has not let go."""
        for path in list(self._stale):
            try:
                self._remove(path)
            except OSError:
                logger.debug("%s stays still", path, exc_info=True)

    def _remove(self, path: Path) -> None:
        remove_model(path, known=self._is_known(path))
        self._published.pop(path, None)
        self._free.discard(path)
        self._stale.discard(path)
        self._said.discard(path)
