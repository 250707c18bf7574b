"""The seam where a save handler that is a callable of its own kind writes and removes files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onnxport.callbacks.training import never_raises
from onnxport.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Listener", "mirrored"]


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
