"""Where a callback stands among other callbacks of one training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxport.callbacks.settings import ExportCallback
from onnxport.exporter.target import target_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["claimed_place", "give_back", "has_the_place", "place_among"]

_CLAIMS = "_names_of_models"


def place_among(callback: ExportCallback, callbacks: Sequence[Any]) -> str | None:
    """Return what to add to the names of a callback's models.

    Args:
        callback: The callback.
        callbacks: All callbacks of the training, with others among them.

    Returns:
        ``""`` if it is alone in its folder or exports the whole module, else its target; ``None``
        if an earlier callback takes the same names.
    """
    peers = [other for other in _exporting(callbacks) if _folder(other) == _folder(callback)]
    earlier = peers[: next((i for i, other in enumerate(peers) if other is callback), 0)]
    if any(_names(other) & _names(callback) for other in earlier):
        return None
    only = callback.settings.targets.get("")
    return f"-{target_text(only)}" if len(peers) > 1 and only else ""


def claimed_place(callback: ExportCallback, training: Any, where: str = "") -> str | None:
    """Return what to add to the names of a callback's models, where nobody knows all callbacks.

    Each leaves a note of its names for those that begin later, until it gives them back.

    Args:
        callback: The callback.
        training: What all callbacks of the training, and of no other one, can see.
        where: Those of one place alone have the same names.

    Returns:
        ``""``, else its target; ``None`` if both are taken.
    """
    taken: dict[str, int] = vars(training).setdefault(_CLAIMS, {})
    only = callback.settings.targets.get("")
    for place in ("", *([f"-{target_text(only)}"] if only else [])):
        suffixes = callback.settings.targets
        names = [f"{where}:{_folder(callback)}:{suffix}{place}" for suffix in suffixes]
        if all(taken.get(name, id(callback)) == id(callback) for name in names):
            taken.update(dict.fromkeys(names, id(callback)))
            return place
    return None


def give_back(callback: ExportCallback, training: Any) -> None:
    """Let others have the names of a callback whose training is over."""
    taken: dict[str, int] = vars(training).get(_CLAIMS, {})
    for name in [name for name, holder in taken.items() if holder == id(callback)]:
        del taken[name]


def has_the_place(
    callback: ExportCallback, callbacks: Sequence[Any], roots: Sequence[Path], model: Path
) -> bool:
    """Tell whether a model lies in a callback's folder, and in none of another one below that.

    Args:
        callback: The callback.
        callbacks: All callbacks of the training, with others among them.
        roots: Folders of checkpoints, beside which models lie where there is no ``dirpath``.
        model: The model.
    """
    place = model.resolve()

    def depth(one: ExportCallback) -> int:
        folders = [one.settings.dirpath] if one.settings.dirpath else roots
        holding = [folder.resolve() for folder in folders if place.is_relative_to(folder.resolve())]
        return max((len(folder.parts) for folder in holding), default=0)

    others = [depth(other) for other in _exporting(callbacks) if other is not callback]
    return depth(callback) >= max(others, default=0)


def _exporting(callbacks: Sequence[Any]) -> list[ExportCallback]:
    return [other for other in callbacks if isinstance(other, ExportCallback)]


def _folder(callback: ExportCallback) -> Path | None:
    folder = callback.settings.dirpath
    return None if folder is None else folder.resolve()


def _names(callback: ExportCallback) -> set[str]:
    """What follows the names of a callback's models where others write to the same folder."""
    return {suffix or target_text(one or "") for suffix, one in callback.settings.targets.items()}
