"""What trainer and worker say to each other: length-prefixed frames on a private socket."""

from __future__ import annotations

import array
import os
import pickle
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxport._files import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from torch import nn

    from onnxport._files import Ticket
    from onnxport.config import ExportOptions
    from onnxport.pipeline import LiveReference
    from onnxport.report import ExportReport, Provenance
    from onnxport.tree import Example

__all__ = [
    "Done",
    "Ready",
    "SentJob",
    "Setup",
    "StageBegun",
    "WeightsFile",
    "receive",
    "send",
]

_HEADER = struct.Struct("!QB")
"""Length of the frame, and how many file descriptors come with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The first message: how the worker should live.

    Args:
        sys_path: Where the trainer finds modules.
        threads: For torch and ONNX Runtime.
        niceness: Added to the priority number of the process; 19 is the least urgent.
        memory_bytes: What the worker may allocate, or ``None``.
        log_level: Level of our own logger.
        preload: Modules that will be needed.
    """

    sys_path: tuple[str, ...]
    threads: int
    niceness: int
    memory_bytes: int | None
    log_level: int
    preload: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsFile:
    """Where a set of weights lies.

    Args:
        path: A file that ``torch.save`` wrote; ``None``: the descriptor that comes with the frame.
        key: Where the ``state_dict`` lies in it; ``""``: it is the whole content.
        identity: Device, inode, size and time of change of the file that is meant.
    """

    path: Path | None
    key: str = ""
    identity: tuple[int, ...] = ()

    @classmethod
    def of_checkpoint(cls, path: Path) -> WeightsFile:
        """Name a checkpoint's file as it is now."""
        return cls(path=path, key="state_dict", identity=identity_of(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class SentJob:
    """An :class:`~onnxport.pipeline.ExportJob` without what the worker has already.

    Args:
        number: Which job it is.
        session: Which training run and target it belongs to.
        weights: Where the weights lie.
        path: Final name of the model.
        options: How to export and prove.
        provenance: Where the weights come from.
        reference: What the live module gave.
        fingerprint: What of the live module is no weight.
        skeleton: The module without weights; ``None``: as before.
        calls: The target and observed calls of it, pickled; ``None``: as before.
        blueprint: A pickled blueprint that was made in the trainer, or ``None``.
        skip: Names of rungs that are not tried.
        only_try: Make no file that lasts: the module is tried before there is a checkpoint.
        template: Where to keep what later models need besides their weights.
        then: See :class:`~onnxport.pipeline.job.ExportJob`.
        ticket: See :class:`~onnxport.pipeline.job.ExportJob`.
        validation: Runs the module's own validation, and how many batches it has, or ``None``.
        brings_batches: The last descriptor of the frame is of the file of these batches; if not,
            it is known.
    """

    number: int
    session: str
    weights: WeightsFile
    path: Path
    options: ExportOptions
    provenance: Provenance
    reference: LiveReference | None
    fingerprint: dict[str, str] | None
    skeleton: bytes | None
    calls: bytes | None
    blueprint: bytes | None = None
    skip: frozenset[str] = frozenset()
    only_try: bool = False
    template: Path | None = None
    then: dict[str, str] | None = None
    ticket: Ticket | None = None
    validation: tuple[Callable[[nn.Module, int], Mapping[str, float]], int] | None = None
    brings_batches: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has imported what it needs."""

    pid: int


@dataclass(frozen=True, slots=True)
class StageBegun:
    """The worker is alive and begins something.

    Args:
        number: Of the job.
        stage: In words.
        rung: The rung that is tried, or ``None``.
    """

    number: int
    stage: str
    rung: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A job is finished.

    Args:
        number: Of the job.
        report: What became of it; ``None``: its checkpoint is gone, and so is the model.
        example: A call of few rows for the live module's next reference, or ``None``.
        row: One row for each input, by name, or ``None``.
        lacks_module: The graph is not right any more, and the worker has no module to export.
    """

    number: int
    report: ExportReport | None
    example: Example | None = None
    row: Mapping[str, np.ndarray[Any, Any]] | None = None
    lacks_module: bool = field(default=False)


def send(channel: socket.socket, message: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message.

    Args:
        channel: A Unix socket.
        message: Anything that can be pickled; or bytes, which are a pickle already.
        descriptors: Open files that the other side gets, too.

    Raises:
        OSError: If the other side is gone.
    """
    body = message if isinstance(message, bytes) else pickle.dumps(message, protocol=5)
    header = _HEADER.pack(len(body), len(descriptors))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    sent = channel.sendmsg([header], rights if descriptors else [])
    channel.sendall(header[sent:])
    channel.sendall(body)


def receive(channel: socket.socket) -> tuple[bytes, tuple[int, ...]] | None:
    """Wait for one message; ``None``: the other side is gone.

    Returns:
        Its bytes and the descriptors that came with it, which belong to the caller.

    Raises:
        TimeoutError: If the channel has a timeout and nothing comes.
    """
    room = socket.CMSG_SPACE(4 * array.array("i").itemsize)
    header, ancillary, _, _ = channel.recvmsg(_HEADER.size, room)
    if not header:
        return None
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    header += _exactly(channel, _HEADER.size - len(header))
    length, _ = _HEADER.unpack(header)
    try:
        return _exactly(channel, length), tuple(descriptors)
    except EOFError:
        for descriptor in descriptors:
            os.close(descriptor)
        return None


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray(size)
    view, place = memoryview(parts), 0
    while place < size:
        count = channel.recv_into(view[place:])
        if not count:
            raise EOFError("the other side is gone")
        place += count
    return bytes(parts)
