"""Where a callback stands: among other callbacks, and whether rank zero has all weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxport.exporter.target import target_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["has_the_place", "is_sharded", "place_among"]

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


def place_among(
    callback: Any, callbacks: Sequence[Any], is_one: Callable[[Any], bool]
) -> str | None:
    """Return what to add to the names of a callback's models.

    Args:
        callback: Has ``dirpath`` and ``targets``, by what follows the names of their models.
        callbacks: All callbacks of the trainer, with others among them.
        is_one: Tells which of them export.

    Returns:
        ``""`` if it is alone in its folder or exports the whole module, else its target; ``None``
        if an earlier callback takes the same names.
    """
    folder = callback.dirpath and callback.dirpath.resolve()
    peers = [
        other
        for other in callbacks
        if is_one(other) and (other.dirpath and other.dirpath.resolve()) == folder
    ]
    earlier = peers[: next((i for i, other in enumerate(peers) if other is callback), 0)]
    if any(_names(other) & _names(callback) for other in earlier):
        return None
    only = callback.targets.get("")
    return f"-{target_text(only)}" if len(peers) > 1 and only else ""


def has_the_place(
    callback: Any, callbacks: Sequence[Any], roots: Sequence[Path], model: Path
) -> bool:
    """Tell whether a model lies in a callback's folder, and in none of another one below that.

    Args:
        callback: Has ``dirpath``.
        callbacks: Those of the trainer that export.
        roots: Folders of checkpoints, beside which models lie where there is no ``dirpath``.
        model: The model.
    """
    place = model.resolve()

    def depth(one: Any) -> int:
        folders = [one.dirpath] if one.dirpath else roots
        holding = [folder.resolve() for folder in folders if place.is_relative_to(folder.resolve())]
        return max((len(folder.parts) for folder in holding), default=0)

    others = [depth(other) for other in callbacks if other is not callback]
    return depth(callback) >= max(others, default=0)


def _names(callback: Any) -> set[str]:
    """What follows the names of a callback's models where others write to the same folder."""
    return {suffix or target_text(one or "") for suffix, one in callback.targets.items()}


def is_sharded(strategy: Any) -> bool:
    """Tell whether each rank holds a part of the weights only."""
    return any(word in kind.__name__ for kind in type(strategy).__mro__ for word in _SHARDED)
