"""Weights that wait for long: to a file without a name, which goes when it is closed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from onnxport.errors import WorkerError

__all__ = ["put_aside"]

_CHUNK_BYTES = 2**22


def put_aside(weights: int, folder: Path) -> int:
    """Copy weights from memory to disk.

    At least as much again stays free: training writes there, too.

    Args:
        weights: Their descriptor, which stays open.
        folder: Where there should be room; it is made.

    Returns:
        The descriptor of the copy.

    Raises:
        WorkerError: If there is too little room.
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened anew, because a duplicate would share its position with whoever else reads.
    opened = Path(f"/dev/fd/{weights}")
    with opened.open("rb") as source, tempfile.TemporaryFile(dir=folder) as target:
        size = os.fstat(source.fileno()).st_size
        if size > _free_bytes(folder) // 2:
            raise WorkerError(
                f"{size / 2**20:.0f} MB are more than half of what is free in {folder}"
            )
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
        target.flush()
        return os.dup(target.fileno())


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
