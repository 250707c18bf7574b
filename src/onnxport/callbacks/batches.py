"""Batches of one validation run, kept in a file that has no name.

Nobody else can open it, and it is gone with the processes that hold it open: what is read from it
may be unpickled.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

from onnxport.exporter.model_file import write_all
from onnxport.exporter.skeleton import NotPicklableError, pickle_by_value, unpickle
from onnxport.tree import map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["MOST_BYTES", "KeptBatches", "read_batches"]

MOST_BYTES = 2**30
"""Of all batches together."""
_HEADER = struct.Struct("!QI")
"""Length of what follows, and the number of the loader."""


class KeptBatches:
    """Writes batches; the descriptor may be given to another process.

    The file is let go with the last reference: what waits for its turn may still need it.

    Attributes:
        counts: How many batches of each loader were kept.
        full: No more are taken: there are enough, or they would be too many.
        problem: Why they cannot be kept, or ``""``.
    """

    def __init__(self, most: int | None = None, most_bytes: int = MOST_BYTES) -> None:
        with tempfile.TemporaryFile(prefix="onnxport-") as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._file = io.FileIO(self._descriptor, "wb", closefd=False)
        self._bytes = 0
        self._most, self._most_bytes = most, most_bytes
        self.counts: Counter[int] = Counter()
        self.full = False
        self.problem = ""

    def add(self, batch: Any, loader: int = 0) -> None:
        """Keep a copy of a batch, its tensors on the CPU.

        Args:
            batch: As a step gets it.
            loader: Number of its loader.
        """
        if self.full or (self._most is not None and self.counts[loader] >= self._most):
            return
        try:
            body = pickle_by_value(map_tensors(batch, _copied))
            if self._bytes + len(body) > self._most_bytes and self.counts:
                self.full = True
                return
            write_all(self._file, _HEADER.pack(len(body), loader))
            write_all(self._file, body)
        except (NotPicklableError, OSError) as error:
            self.full, self.problem = True, f"Its batches cannot be kept: {error}"
            return
        self._bytes += len(body)
        self.counts[loader] += 1

    def fileno(self) -> int:
        """Return the descriptor of the file."""
        return self._descriptor


def read_batches(descriptor: int, loader: int) -> Iterator[Any]:
    """Yield the batches of one loader, in order; each reader for itself.

    Args:
        descriptor: Of the file; its position is not moved.
        loader: Number of the loader.
    """
    place = 0
    while header := os.pread(descriptor, _HEADER.size, place):
        length, number = _HEADER.unpack(header)
        place += _HEADER.size
        if number == loader:
            yield unpickle(_exactly(descriptor, length, place))
        place += length


def _exactly(descriptor: int, length: int, place: int) -> bytes:
    parts = []
    while length:
        part = os.pread(descriptor, length, place)
        if not part:
            raise EOFError("the file of batches has been cut off")
        parts.append(part)
        place, length = place + len(part), length - len(part)
    return b"".join(parts)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    # A view would be written with all of what it is a view of.
    return tensor.detach().to("cpu", copy=True)
