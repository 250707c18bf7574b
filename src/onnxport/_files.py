"""Files in folders that somebody may be working in: found, written in one step, recognised."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from onnxport.errors import UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BEGUN",
    "DATA_SUFFIX",
    "MOST_BYTES",
    "OWED",
    "REFUSED",
    "UNTOLD",
    "Ticket",
    "ending_of",
    "folder_to_start_in",
    "hidden_below",
    "identity_of",
    "is_there",
    "read_small",
    "replace_content",
    "require_inside",
    "size_of_model",
    "sweep_begun",
    "sync",
]

OWED, UNTOLD, REFUSED = ".pending", ".tracking", ".refused"
NOTES = (OWED, UNTOLD, REFUSED)
"""Hidden files beside a model: it is still to be made; a server is still to be told of it. Beside a
checkpoint: the folder of its model has refused the first."""
PAGE_SUFFIX = ".html"
BEGUN = ".tmp"
DATA_SUFFIX = ".data"
"""Behind the name of a model: its weights, where they lie outside of it."""
MOST_BYTES = 1 << 26
"""What a report, a note or a job can hold at most."""
_ABANDONED_S = 60.0
"""Where files cannot be locked, one that was begun so long ago will never be finished."""
_TRIES = 3
_ENDING_BYTES = 1 << 16


def hidden_below(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield the hidden files with a suffix in a folder and below; none, if it is no folder.

    Folders that vanish meanwhile are passed over, where ``Path.rglob`` would raise.
    """
    for place, _, names in os.walk(folder):
        yield from (
            Path(place) / name for name in names if name.startswith(".") and name.endswith(suffix)
        )


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk.

    Raises:
        OSError: If that fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_small(path: Path) -> bytes:
    """Read a file of ours that cannot be large: what somebody has put there may be.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is larger than any of ours.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is larger than {MOST_BYTES >> 20} MiB")
    return content


def is_there(path: Path) -> bool:
    """Tell whether something has this name; a disk that does not say counts as no.

    ``Path.exists`` raises what a disk says, a stale handle of a network file system for instance.
    """
    return os.path.exists(path)  # noqa: PTH110 - see above


def require_inside(file: Path) -> None:
    """Refuse a file that is a link to a place outside of its folder: it would be read in its name.

    Raises:
        UnsafeFileError: If it is one.
        OSError: If it cannot be followed.
    """
    if not file.resolve(strict=True).is_relative_to(file.parent.resolve(strict=True)):
        raise UnsafeFileError(
            f"{file} is a link to a place outside of its folder, and is not read. Put the file "
            "itself there."
        )


def identity_of(path: Path) -> tuple[int, ...]:
    """Return what tells a file from one that takes its place: device, inode, size, time of change.

    Raises:
        OSError: If there is none.
    """
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def ending_of(path: Path) -> str:
    """Return a hash of how a file ends, which tells one checkpoint from another, moved or not.

    What ``torch.save`` writes ends with a directory that has the size and a checksum of each
    tensor. Of what is no file nothing is told.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _ENDING_BYTES))
            return hashlib.sha256(b"%d:%b" % (size, file.read())).hexdigest()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A file that must stay as it is; who changes it withdraws what was asked for with it.

    Args:
        path: The file.
        identity: Of the file, see :func:`identity_of`.
    """

    path: Path
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Ticket | None:
        """Take a file as it is now; ``None``: it is not there."""
        try:
            return cls(path, identity_of(path))
        except OSError:
            return None

    def is_valid(self) -> bool:
        """Tell whether it is still the same."""
        return Ticket.of(self.path) == self


def replace_content(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it.

    Whoever is killed meanwhile leaves a file that :func:`sweep_begun` removes. Nothing is synced.

    Raises:
        OSError: If the disk does not take it.
        FileNotFoundError: If there is no such folder.
    """
    begun = path.with_name(f".{path.name.lstrip('.')}{BEGUN}")
    for tries_left in reversed(range(_TRIES)):
        try:
            with begun.open("wb") as file:
                _lock(file)
                file.write(content)
                file.flush()
                begun.replace(path)
                return
        except FileNotFoundError:  # it was swept before it was locked; or there is no folder
            if not tries_left or not path.parent.is_dir():
                raise
        except OSError:
            with suppress(OSError):
                begun.unlink()
            raise


def sweep_begun(folder: Path) -> None:
    """Remove what :func:`replace_content` has begun in processes that are no more.

    Args:
        folder: Where; not below.
    """
    for begun in folder.glob(f".*{BEGUN}"):
        if not begun.name.removesuffix(BEGUN).endswith((*NOTES, PAGE_SUFFIX)):
            continue
        with suppress(OSError), begun.open("rb") as file:
            if _lock(file):
                begun.unlink()


def _lock(file: BinaryIO) -> bool:
    """Lock an open file, if nobody has; the system unlocks it when its process ends."""
    if fcntl is None:
        return time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED_S
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def folder_to_start_in() -> str | None:
    """Return where a process of ours should start; ``None``: where this one is.

    The current folder may have been removed, and libraries that look for themselves find nothing
    then: Intel's MKL ends the process.
    """
    try:
        os.getcwd()  # noqa: PTH109 - of interest is whether it raises
    except OSError:
        return os.sep
    return None


def size_of_model(path: Path) -> int:
    """Return the bytes of a model, with its external data."""
    files = (path, path.with_name(path.name + DATA_SUFFIX))
    return sum(file.stat().st_size for file in files if file.exists())
