"""Follow the links that Lightning makes to checkpoints: ``ModelCheckpoint(save_last="link")``.

They are made without the checkpoint plugin, which sees every save and no link.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.errors import PublishError
from onnxport.exporter.writer import report_path, require_replaceable, staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["mirror_links", "remove_link"]

logger = logging.getLogger(__name__)


def mirror_links(trainer: Any, path_of: Callable[[str], Path]) -> None:
    """Give each link to a checkpoint a link to its model.

    Args:
        trainer: The trainer.
        path_of: Returns where the model of a checkpoint lies.
    """
    for link, target in _links(trainer):
        try:
            _follow(path_of(target), path_of(link))
        except (OSError, PublishError) as error:
            logger.warning("%s has no model: %s", link, error)


def remove_link(path: Path) -> bool:
    """Remove a link to a model and to its report; tell whether it was one."""
    if not path.is_symlink():
        return False
    for link in (path, report_path(path)):
        if link.is_symlink():
            link.unlink()
    return True


def _links(trainer: Any) -> Iterator[tuple[str, str]]:
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


def _follow(model: Path, link: Path) -> None:
    require_replaceable(link)
    for target, name in ((model, link), (report_path(model), report_path(link))):
        if not target.exists():
            if name.is_symlink():
                name.unlink()
            continue
        with staging(name) as staged:
            try:
                staged.symlink_to(os.path.relpath(target, name.parent))
            except OSError:  # Windows allows links to some users only
                shutil.copy2(target, staged)
            staged.replace(name)
