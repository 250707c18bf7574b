"""Links to models, for links to checkpoints."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from onnxport.exporter.writer import report_path, require_replaceable, staging

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["follow_link", "remove_link"]


def follow_link(model: Path, link: Path) -> None:
    """Link to a model as somebody has linked to its checkpoint; no model, no link.

    Args:
        model: Of the checkpoint.
        link: Of the link to it.

    Raises:
        PublishError: If a file of somebody else has the name.
        OSError: If the disk does not take it.
    """
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


def remove_link(path: Path) -> bool:
    """Remove a link to a model and to its report; tell whether it was one."""
    if not path.is_symlink():
        return False
    for link in (path, report_path(path)):
        if link.is_symlink():
            link.unlink()
    return True
