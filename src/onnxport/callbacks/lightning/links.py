"""Follow the links that Lightning makes to checkpoints: ``ModelCheckpoint(save_last="link")``.

They are made without the checkpoint plugin, which sees every save and no link.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["links_of"]


def links_of(trainer: Any) -> Iterator[tuple[str, str]]:
    """Yield each link to a checkpoint, and the checkpoint."""
    for callback in trainer.checkpoint_callbacks:
        last = getattr(callback, "last_model_path", "")
        if getattr(callback, "save_last", None) != "link" or not last:
            continue
        if Path(last).is_symlink():
            yield last, str(Path(last).parent / Path(last).readlink())
        else:  # copied, where links are not allowed; or saved, and then it has a model
            saved = getattr(callback, "_last_checkpoint_saved", "")
            if saved and saved != last:
                yield last, saved
