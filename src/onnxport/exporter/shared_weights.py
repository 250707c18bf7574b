"""Weights in memory that another process can map: put there once, and never copied again."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SharedWeights", "shared_descriptor"]


class SharedWeights(dict[str, Any]):
    """A ``state_dict`` whose tensors lie in a file in memory, as ``torch.save`` would write it.

    Args:
        shapes: Shape and dtype of each tensor; their values are set afterwards, in place.

    Raises:
        OSError: If the system has no such files, or no room for this one.
        Exception: Whatever torch raises for tensors that it cannot lay out.
    """

    def __init__(self, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no files in memory")
        super().__init__()
        self.file = os.memfd_create("onnxport")
        weakref.finalize(self, os.close, self.file)
        empty = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
        with torch.serialization.skip_data():
            torch.save(empty, self._path)
        # Pages that are missing later would end the process; here it is an error.
        os.posix_fallocate(self.file, 0, os.fstat(self.file).st_size)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            self.update(torch.load(self._path, mmap=True, weights_only=True))

    @property
    def _path(self) -> str:
        return f"/proc/self/fd/{self.file}"


def shared_descriptor(state: Mapping[str, Any]) -> int | None:
    """Return a descriptor of the file that holds the weights, if there is one.

    Args:
        state: A ``state_dict``.

    Returns:
        A descriptor that belongs to the caller.
    """
    return os.dup(state.file) if isinstance(state, SharedWeights) else None
