"""A disk that fails when it is told to, and that writes down what it was asked to do.

    python tests/faults/disk.py KEPT MOUNT PLAN LOG

A file system in user space (FUSE): whoever works on it, trainer, worker, torch or ONNX Runtime,
gets the errors from the kernel, as from a bad disk. It passes everything on to the folder ``KEPT``.
``PLAN`` is a JSON file with :class:`Rule` as plain values, read again whenever it has changed;
``LOG`` gets one pickled :class:`Operation` after the other. See :func:`mounted`.
"""

from __future__ import annotations

import ctypes.util
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mfusepy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

START_LIMIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What goes wrong.

    Args:
        operations: Names of operations; empty: all that change something.
        match: Pattern of the path below the mount.
        after: How many that match go well before.
        times: How many fail then; -1: all.
        error: Number of the error; 0: none, the operation is done.
        kill: The process that asks is killed.
        wait_s: How long the answer takes, in seconds.
    """

    operations: tuple[str, ...] = ()
    match: str = "*"
    after: int = 0
    times: int = 1
    error: int = errno.EIO
    kill: bool = False
    wait_s: float = 0.0


@dataclass
class _Counted:
    """A rule, how often it was asked, and how often something went wrong."""

    rule: Rule
    seen: int = 0
    fired: int = 0

    def fires(self, name: str, path: str) -> bool:
        """Count an operation; tell whether it goes wrong."""
        rule = self.rule
        if name not in (rule.operations or CHANGES) or not fnmatch(path, rule.match):
            return False
        self.seen += 1
        if self.seen <= rule.after or 0 <= rule.times <= self.fired:
            return False
        self.fired += 1
        return True


class Operation(NamedTuple):
    """What the disk was asked to do, and did.

    Args:
        name: As of the system call; ``sync`` is ``fsync`` of a file or a folder.
        path: Below the mount, without a slash before it.
        file: Number of the file that is meant, whatever it is called by then; 0: none.
        value: The other path, the bytes, or the size.
        offset: Where the bytes go.
    """

    name: str
    path: str
    file: int = 0
    value: Any = None
    offset: int = 0


CHANGES = frozenset(
    {
        *("mkdir", "create", "write", "truncate", "sync", "rename", "unlink", "rmdir"),
        *("link", "symlink", "utimens", "chmod"),
    }
)


class Disk(mfusepy.Operations):  # type: ignore[misc]
    """The file system.

    Args:
        kept: Folder where everything really lies.
        plan: Its rules.
        log: Where operations are written down.
    """

    use_ns = True

    def __init__(self, kept: Path, plan: Path, log: Path) -> None:
        self._kept, self._plan = kept, plan
        self._log = log.open("ab", buffering=0)
        self._fired = plan.with_suffix(".fired")
        self._read_at = 0
        self._rules: list[_Counted] = []
        self._numbers: dict[int, int] = {}
        self._next = 1

    # --- faults and log ---------------------------------------------------------------------

    def _asked(self, name: str, path: str) -> None:
        """Fail, wait or kill, if a rule says so.

        Raises:
            mfusepy.FuseOSError: As the rule says.
        """
        changed = self._plan.stat().st_mtime_ns
        if changed != self._read_at:
            self._read_at = changed
            rules = json.loads(self._plan.read_text(encoding="utf-8"))
            self._rules = [_Counted(Rule(**each)) for each in rules]
        for rule in [each.rule for each in self._rules if each.fires(name, path.lstrip("/"))]:
            with self._fired.open("a", encoding="utf-8") as file:
                file.write(f"{name} {path}\n")
            time.sleep(rule.wait_s)
            if rule.kill:
                with suppress(ProcessLookupError):
                    os.kill(mfusepy.fuse_get_context()[2], signal.SIGKILL)
            if rule.error:
                raise mfusepy.FuseOSError(rule.error)

    def _done(
        self, name: str, path: str, file: int = 0, value: Any = None, offset: int = 0
    ) -> None:
        done = Operation(name, path.lstrip("/"), file, value, offset)
        self._log.write(pickle.dumps(tuple(done)))

    def _real(self, path: str) -> str:
        return f"{self._kept}/{path.lstrip('/')}"

    def _number(self, descriptor: int) -> int:
        inode = os.fstat(descriptor).st_ino
        if inode not in self._numbers:
            self._numbers[inode], self._next = self._next, self._next + 1
        return self._numbers[inode]

    # --- what asks --------------------------------------------------------------------------

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        self._asked("getattr", path)
        state = os.fstat(fh) if fh else os.lstat(self._real(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        times = {f"st_{k}time": getattr(state, f"st_{k}time_ns") for k in "amc"}
        return {name: getattr(state, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> Iterable[tuple[str, dict[str, int], int]]:
        self._asked("readdir", path)
        real = self._real(path)
        found = [".", "..", *os.listdir(real)]  # noqa: PTH208 - names alone
        for name in found:
            try:
                state = os.lstat(f"{real}/{name}")
            except FileNotFoundError:  # removed meanwhile
                continue
            # An entry without a number would not be shown.
            yield name, {"st_mode": state.st_mode, "st_ino": state.st_ino}, 0

    def readlink(self, path: str) -> str:
        return os.readlink(self._real(path))  # noqa: PTH115 - text, as the kernel wants it

    def statfs(self, path: str) -> dict[str, int]:
        state = os.statvfs(self._real(path))
        names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files")
        return {name: getattr(state, name) for name in (*names, "f_frsize", "f_namemax")}

    def open(self, path: str, flags: int) -> int:
        self._asked("open", path)
        return os.open(self._real(path), flags & ~os.O_APPEND)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._asked("read", path)
        return os.pread(fh, size, offset)

    # --- what changes -----------------------------------------------------------------------

    def mkdir(self, path: str, mode: int) -> None:
        self._asked("mkdir", path)
        os.mkdir(self._real(path), mode)  # noqa: PTH102
        self._done("mkdir", path)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._asked("create", path)
        descriptor = os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
        self._numbers.pop(os.fstat(descriptor).st_ino, None)  # of a file that is gone
        self._done("create", path, self._number(descriptor))
        return descriptor

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._asked("write", path)
        size = os.pwrite(fh, data, offset)
        self._done("write", path, self._number(fh), bytes(data[:size]), offset)
        return size

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        self._asked("truncate", path)
        descriptor = fh or os.open(self._real(path), os.O_RDWR)
        try:
            os.ftruncate(descriptor, length)
            self._done("truncate", path, self._number(descriptor), length)
        finally:
            if not fh:
                os.close(descriptor)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        self._asked("sync", path)
        self._done("sync", path, self._number(fh))

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        self._asked("sync", path)
        self._done("sync", path)

    def rename(self, old: str, new: str) -> None:
        self._asked("rename", new)
        os.rename(self._real(old), self._real(new))  # noqa: PTH104
        self._done("rename", old, value=new.lstrip("/"))

    def unlink(self, path: str) -> None:
        self._asked("unlink", path)
        os.unlink(self._real(path))  # noqa: PTH108
        self._done("unlink", path)

    def rmdir(self, path: str) -> None:
        self._asked("rmdir", path)
        os.rmdir(self._real(path))  # noqa: PTH106
        self._done("rmdir", path)

    def link(self, target: str, source: str) -> None:
        self._asked("link", target)
        os.link(self._real(source), self._real(target))
        self._done("link", source, value=target.lstrip("/"))

    def symlink(self, target: str, source: str) -> None:
        self._asked("symlink", target)
        os.symlink(source, self._real(target))  # noqa: PTH211
        self._done("symlink", target, value=source)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        self._asked("utimens", path)
        os.utime(self._real(path), ns=times, follow_symlinks=False)

    def chmod(self, path: str, mode: int) -> None:
        self._asked("chmod", path)
        os.chmod(self._real(path), mode)  # noqa: PTH101

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._real(path), uid, gid, follow_symlinks=False)

    def access(self, path: str, amode: int) -> None:
        return None

    def flush(self, path: str, fh: int) -> None:
        return None

    def release(self, path: str, fh: int) -> None:
        os.close(fh)


# --- for tests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mounted:
    """A disk that is there.

    Args:
        folder: Where it is mounted.
        kept: Where everything really lies.
        plan: The file of its rules.
        log: What it has done.
    """

    folder: Path
    kept: Path
    plan: Path
    log: Path

    def fail(self, *rules: Rule) -> None:
        """Let this go wrong from now on, and nothing else."""
        self.plan.with_suffix(".fired").unlink(missing_ok=True)
        begun = self.plan.with_suffix(".new")
        begun.write_text(json.dumps([asdict(rule) for rule in rules]), encoding="utf-8")
        begun.replace(self.plan)

    @property
    def fired(self) -> list[str]:
        """What has gone wrong since then."""
        try:
            return self.plan.with_suffix(".fired").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []

    def operations(self) -> list[Operation]:
        """What it has done so far."""
        found = []
        with self.log.open("rb") as file:
            while True:
                try:
                    found.append(Operation(*pickle.load(file)))  # noqa: S301 - our own process wrote it
                except EOFError:
                    return found


def why_not() -> str:
    """Return why there can be no such disk here; empty: there can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be used here"
    if os.geteuid() != 0:
        return "mounting takes root"
    if ctypes.util.find_library("fuse3") is None:
        return "libfuse3 is not installed"
    return ""


@contextmanager
def mounted(root: Path, *, recorded: bool = True) -> Iterator[Mounted]:
    """Mount a disk for the block.

    Args:
        root: Where it may keep what it needs.
        recorded: Whether it writes down what it is asked to do, with all that is written.

    Raises:
        RuntimeError: If it does not come up.
    """
    log = root / "log" if recorded else Path(os.devnull)
    disk = Mounted(root / "disk", root / "kept", root / "plan.json", log)
    for folder in (disk.folder, disk.kept):
        folder.mkdir(parents=True)
    disk.log.touch()
    disk.fail()
    command = [sys.executable, __file__, *map(str, (disk.kept, disk.folder, disk.plan, disk.log))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + START_LIMIT_S
        while not os.path.ismount(disk.folder):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"no disk: {process.communicate()[1].decode()}")
            time.sleep(0.02)
        yield disk
    finally:
        subprocess.run(["/bin/umount", "-l", str(disk.folder)], check=False)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        process.kill()
        process.communicate()


def _serve(kept: str, mount: str, plan: str, log: str) -> None:
    options = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0, "use_ino": True}
    mfusepy.FUSE(
        Disk(Path(kept), Path(plan), Path(log)), mount, foreground=True, nothreads=True, **options
    )


if __name__ == "__main__":
    _serve(*sys.argv[1:])
