"""The seam where checkpoints are written and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    OnSaved = Callable[[dict[str, Any], str], None]
    OnRemoved = Callable[[str], None]
    OnInterrupted = Callable[[str], None]

__all__ = ["MirroredCheckpointIO"]


class MirroredCheckpointIO:
    """Passes everything on to another checkpoint plugin and reports saves and removals.

    This is the only place that sees every checkpoint with its final content, weights-only ones and
    manual ones included, and every removal. A callback's ``on_save_checkpoint`` comes before the
    file exists, is left out for ``save_weights_only=True``, and has no counterpart for removals.

    Args:
        inner: The plugin that does the work.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.listeners: dict[Any, tuple[OnSaved, OnRemoved, OnInterrupted]] = {}

    def listen(
        self,
        key: Any,
        on_saved: OnSaved,
        on_removed: OnRemoved,
        on_interrupted: OnInterrupted = lambda _: None,
    ) -> None:
        """Report to somebody from now on.

        Args:
            key: Who listens; who listens again takes the place of their earlier self.
            on_saved: Called with the checkpoint's content and path once it was saved.
            on_removed: Called with the path once it was removed.
            on_interrupted: Called with the path if Ctrl-C or an exit came while it was saved, or
                before ``on_saved`` has returned: nobody knows how far that got.
        """
        self.listeners[key] = (on_saved, on_removed, on_interrupted)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save, then report.

        Raises:
            KeyboardInterrupt: Goes on.
            SystemExit: Goes on.
        """
        untold = list(self.listeners.values())
        try:
            self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
            while untold:
                on_saved, _, _ = untold[0]
                on_saved(checkpoint, str(path))
                untold.pop(0)
        except (KeyboardInterrupt, SystemExit):
            for _, _, on_interrupted in untold:
                on_interrupted(str(path))
            raise

    def remove_checkpoint(self, path: Any) -> None:
        """Remove, then report."""
        self.inner.remove_checkpoint(path)
        for _, on_removed, _ in tuple(self.listeners.values()):
            on_removed(str(path))

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set: unpickling, copying
            raise AttributeError(name)
        return getattr(self.inner, name)
