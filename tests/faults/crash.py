"""What a folder may look like after the power has failed.

A disk keeps for sure what was synced. What was not synced may be there, or be lost, and a name may
be there without what is in the file. :func:`states` gives the folders that may be found after a
number of operations, by the rules that file systems have:

- ``killed``: everything is there; the processes alone were killed.
- ``strict``: POSIX: names are there as of the last sync of their folder, content as of the last
  sync of its file.
- ``empty``, ``zeros``, ``half``: names and sizes are kept in order (ext4, xfs), content that was
  not synced is empty, zeros, or there by half.
- ``names lost``: all content is there, names as of the last sync of their folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from disk import Operation

MODELS = ("killed", "strict", "empty", "zeros", "half", "names lost")


@dataclass(frozen=True)
class State:
    """A folder as it may be found.

    Args:
        folders: Paths of folders below it.
        files: Paths -> content; a link's is a path behind ``->``.
    """

    folders: frozenset[str]
    files: dict[str, bytes]

    def lay(self, root: Path) -> None:
        """Make such a folder."""
        for path in sorted(self.folders):
            (root / path).mkdir(parents=True, exist_ok=True)
        for path, content in self.files.items():
            if content.startswith(_LINK):
                (root / path).symlink_to(content.removeprefix(_LINK).decode())
            else:
                (root / path).write_bytes(content)


_LINK = b"\0link->"


@dataclass
class _Disk:
    """What there is, and what there is for sure."""

    folders: set[str] = field(default_factory=lambda: {""})
    names: dict[str, int] = field(default_factory=dict)
    content: dict[int, bytearray] = field(default_factory=dict)
    sure_names: dict[str, dict[str, int | None]] = field(default_factory=dict)
    sure_content: dict[int, bytes] = field(default_factory=dict)

    def do(self, operation: Operation) -> None:
        """Carry out one operation."""
        getattr(self, f"_{operation.name}")(operation)

    def _mkdir(self, done: Operation) -> None:
        self.folders.add(done.path)

    def _rmdir(self, done: Operation) -> None:
        self.folders.discard(done.path)

    def _create(self, done: Operation) -> None:
        self.names[done.path] = done.file
        self.content[done.file] = bytearray()

    def _write(self, done: Operation) -> None:
        content = self.content.setdefault(done.file, bytearray())
        end = done.offset + len(done.value)
        content.extend(bytes(max(0, end - len(content))))
        content[done.offset : end] = done.value

    def _truncate(self, done: Operation) -> None:
        content = self.content.setdefault(done.file, bytearray())
        content.extend(bytes(max(0, done.value - len(content))))
        del content[done.value :]

    def _symlink(self, done: Operation) -> None:
        number = -1 - len(self.content)
        self.names[done.path] = number
        self.content[number] = bytearray(_LINK + done.value.encode())
        self.sure_content[number] = bytes(self.content[number])

    def _link(self, done: Operation) -> None:
        self.names[done.value] = self.names[done.path]

    def _unlink(self, done: Operation) -> None:
        self.names.pop(done.path, None)

    def _rename(self, done: Operation) -> None:
        old, new = done.path, done.value
        if old in self.folders:
            self.folders = {_moved(path, old, new) for path in self.folders}
            self.names = {_moved(path, old, new): file for path, file in self.names.items()}
        else:
            self.names[new] = self.names.pop(old)

    def _sync(self, done: Operation) -> None:
        if done.file:
            self.sure_content[done.file] = bytes(self.content[done.file])
        else:
            self.sure_names[done.path] = self._entries(done.path)

    def _entries(self, folder: str) -> dict[str, int | None]:
        found: dict[str, int | None] = {
            path: None for path in self.folders if path and _parent(path) == folder
        }
        return found | {path: n for path, n in self.names.items() if _parent(path) == folder}

    def state(self, model: str) -> State:
        """Return what may be found now."""
        if model in {"strict", "names lost"}:
            folders, names = self._sure()
        else:
            folders, names = self.folders, self.names
        return State(
            frozenset(folders), {path: self._found(file, model) for path, file in names.items()}
        )

    def _sure(self) -> tuple[set[str], dict[str, int]]:
        folders, names, left = set(), {}, [""]
        while left:
            folder = left.pop()
            folders.add(folder)
            for path, file in self.sure_names.get(folder, {}).items():
                if file is None:
                    left.append(path)
                else:
                    names[path] = file
        return folders, names

    def _found(self, file: int, model: str) -> bytes:
        now, sure = bytes(self.content[file]), self.sure_content.get(file)
        if model in {"killed", "names lost"} or now == sure:
            return now
        if model == "strict":
            return sure or b""
        return {"empty": b"", "zeros": bytes(len(now)), "half": now[: len(now) // 2]}[model]


def states(operations: Sequence[Operation], after: int) -> Iterator[tuple[str, State]]:
    """Yield the folders that may be found after so many operations.

    Args:
        operations: What the disk was asked to do, from the beginning.
        after: How many of them were done.
    """
    disk = _Disk()
    for operation in operations[:after]:
        disk.do(operation)
    for model in MODELS:
        yield model, disk.state(model)


def all_states(operations: Sequence[Operation]) -> Iterator[tuple[int, str, State]]:
    """Yield the folders that may be found after each operation."""
    disk = _Disk()
    for after, operation in enumerate(operations, start=1):
        disk.do(operation)
        for model in MODELS:
            yield after, model, disk.state(model)


def _moved(path: str, old: str, new: str) -> str:
    inside = path == old or path.startswith(f"{old}/")
    return new + path[len(old) :] if inside else path


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
