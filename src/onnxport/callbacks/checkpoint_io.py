"""The seam where checkpoints are written and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    OnSaved = Callable[[dict[str, Any], str], None]
    OnPath = Callable[[str], None]

__all__ = ["MirroredCheckpointIO"]


class _Listener(NamedTuple):
    """Who is told, see :meth:`MirroredCheckpointIO.listen`."""

    on_saved: OnSaved
    on_removed: OnPath
    on_interrupted: OnPath
    on_saving: OnPath
    on_removing: OnPath


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
        self.listeners: dict[Any, _Listener] = {}

    def listen(
        self,
        key: Any,
        on_saved: OnSaved,
        on_removed: OnPath,
        *,
        on_interrupted: OnPath = lambda _: None,
        on_saving: OnPath = lambda _: None,
        on_removing: OnPath = lambda _: None,
    ) -> None:
        """Report to somebody from now on.

        Args:
            key: Who listens; who listens again takes the place of their earlier self.
            on_saved: Called with the checkpoint's content and path once it was saved.
            on_removed: Called with the path once it was removed.
            on_interrupted: Called with the path if Ctrl-C or an exit came while it was saved, or
                before ``on_saved`` has returned: nobody knows how far that got.
            on_saving: Called with the path before something is saved there. Must not raise.
            on_removing: Called with the path before what is there is removed. Must not raise.
        """
        self.listeners[key] = _Listener(
            on_saved, on_removed, on_interrupted, on_saving, on_removing
        )

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
            for listener in untold:
                listener.on_saving(str(path))
            self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
            while untold:
                untold[0].on_saved(checkpoint, str(path))
                untold.pop(0)
        except (KeyboardInterrupt, SystemExit):
            for listener in untold:
                listener.on_interrupted(str(path))
            raise

    def remove_checkpoint(self, path: Any) -> None:
        """Remove, then report."""
        told = tuple(self.listeners.values())
        for listener in told:
            listener.on_removing(str(path))
        self.inner.remove_checkpoint(path)
        for listener in told:
            listener.on_removed(str(path))

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set: unpickling, copying
            raise AttributeError(name)
        return getattr(self.inner, name)
