"""Seams where checkpoints are written: a strategy's method, and a handler that is callable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onnxport.callbacks.training import never_raises
from onnxport.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Listener", "MirroredSave", "SaveListener", "mirrored"]


class Listener(Protocol):
    """Who is told, each time with the path of a checkpoint."""

    def saving(self, path: str) -> None:
        """Something is about to be saved."""

    def saved(self, path: str, content: Mapping[str, Any], score: Mapping[str, Any]) -> None:
        """It was saved, with this content and these facts."""

    def removing(self, path: str) -> None:
        """Something is about to be removed."""

    def removed(self, path: str) -> None:
        """It was removed."""


def mirrored(handler: Any, listener: Listener) -> Any:
    """Return a save handler of the same kind that reports what it saves and removes.

    Args:
        handler: Writes to a folder, its ``dirname``, in calls of itself, and has ``remove``.
        listener: Is told.

    Raises:
        ConfigurationError: If it does not write to a folder of this machine.
    """
    if not hasattr(handler, "dirname"):
        raise ConfigurationError(
            f"{type(handler).__name__} does not save to a folder of this machine. Models lie "
            "beside checkpoints: use a handler that writes to a disk."
        )
    kind = type(handler)

    class Mirrored(kind):  # type: ignore[misc, valid-type]
        def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
            path = str(Path(self.dirname) / filename)
            with never_raises(f"the save of {path}"):
                listener.saving(path)
            super().__call__(checkpoint, filename, metadata)
            with never_raises(f"the save of {path}"):
                listener.saved(path, checkpoint, metadata or {})

        def remove(self, filename: str) -> None:
            path = str(Path(self.dirname) / filename)
            listener.removing(path)
            super().remove(filename)
            listener.removed(path)

    made: Any = object.__new__(Mirrored)
    made.__dict__.update(vars(handler))
    return made


class SaveListener(Protocol):
    """Who is told, each time with the path of a checkpoint."""

    def saving(self, path: str) -> None:
        """Something is about to be saved."""

    def saved(self, path: str, content: Mapping[str, Any]) -> None:
        """It was saved, with this content."""


class MirroredSave:
    """Takes the place of a strategy's ``save_checkpoint``, in all processes: all saves come here.

    Args:
        save: What does the work.

    Attributes:
        listeners: Who is told.
    """

    def __init__(self, save: Callable[..., Any]) -> None:
        self._save = save
        self.listeners: dict[int, SaveListener] = {}

    def __call__(
        self,
        path: Any,
        state: Any,
        storage_options: Any = None,
        filter: Any = None,  # noqa: A002 - the strategy's name
    ) -> Any:
        """Save, and report; a part of some weights is reported as none of them."""
        for listener in tuple(self.listeners.values()):
            with never_raises(f"the save of {path}"):
                listener.saving(str(path))
        result = self._save(path, state, storage_options=storage_options, filter=filter)
        whole = {name: one for name, one in state.items() if name not in (filter or {})}
        for listener in tuple(self.listeners.values()):
            with never_raises(f"the save of {path}"):
                listener.saved(str(path), whole)
        return result
