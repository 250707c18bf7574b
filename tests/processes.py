"""A script that several processes run together, as on a cluster."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from servers import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LIMIT_S = 240
TESTS = str(Path(__file__).parent)

_MARK = "ONNXPORT_TEST_FAMILY"
"""What a process inherits says whose child it is, even when its parents are gone."""


class Family:
    """Processes of one script, and all that they start.

    Args:
        folder: Where their logs are.
        ranks: Those that run the script.
        mark: What all of them have in their environment.
    """

    def __init__(self, folder: Path, ranks: list[subprocess.Popen[bytes]], mark: str) -> None:
        self.folder = folder
        self.ranks = ranks
        self._mark = f"{_MARK}={mark}".encode()

    @property
    def said(self) -> str:
        """What they have printed so far."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def living(self) -> list[int]:
        """Return the numbers of all that run, those that nobody waits for with them."""
        found = []
        for place in Path("/proc").iterdir():
            try:
                mine = place.name.isdigit() and self._mark in (place / "environ").read_bytes()
            except OSError:  # it has ended, or is somebody else's
                continue
            if mine and place.name != str(os.getpid()):
                found.append(int(place.name))
        return found

    def memory(self) -> int:
        """Return how many bytes all of them hold.

        What they share counts once, and pages of files, which the system takes back, do not.
        """
        return sum(_held_by(process) for process in self.living())

    def until(self, there: Callable[[], object], limit_s: float = LIMIT_S) -> None:
        """Wait for something that they do; a process that ends early is an error."""
        end = time.monotonic() + limit_s
        while not there():
            assert all(rank.poll() is None for rank in self.ranks), self.said[-4000:]
            assert time.monotonic() < end, self.said[-4000:]
            time.sleep(0.05)

    def signal(self, number: int, *, ranks: bool = True) -> None:
        """Send a signal to each process that there is, as a terminal or a cluster does.

        Args:
            number: Of the signal.
            ranks: Whether those that run the script get it, too.
        """
        spared = () if ranks else {rank.pid for rank in self.ranks}
        for process in set(self.living()).difference(spared):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Wait until the script has ended everywhere; return the exit codes."""
        end = time.monotonic() + limit_s
        return [rank.wait(timeout=max(0.1, end - time.monotonic())) for rank in self.ranks]


def _held_by(process: int) -> int:
    """Return a process's part of memory that is no file, in bytes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    counted = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(counted))


@contextmanager
def started(
    script: str,
    folder: Path,
    processes: int,
    *arguments: str,
    environment: Callable[[int], Mapping[str, str]] | None = None,
) -> Iterator[Family]:
    """Run a script in several processes that know of each other; none outlives the context.

    Args:
        script: Its text.
        folder: Where it and its logs go.
        processes: How many.
        arguments: Of the script.
        environment: Gives what a rank has in its environment; default: as ``torchrun`` has it.
    """
    file = folder / "train.py"
    file.write_text(script)
    mark = secrets.token_hex(8)
    environment = environment or _as_torchrun(processes)
    with ExitStack() as open_logs:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(file), *arguments],
                env=os.environ | {_MARK: mark, "PYTHONFAULTHANDLER": "1"} | environment(rank),
                stdout=(log := open_logs.enter_context((folder / f"{rank}.log").open("w"))),
                stderr=log,
            )
            for rank in range(processes)
        ]
        family = Family(folder, ranks, mark)
        try:
            yield family
        finally:
            family.signal(9)
            for rank in ranks:
                rank.wait()


def _as_torchrun(processes: int) -> Callable[[int], Mapping[str, str]]:
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world = meet | {"WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    return lambda rank: world | {"LOCAL_RANK": str(rank)}


def together(script: str, folder: Path, processes: int, *arguments: str) -> str:
    """Run a script in several processes to its end; return what they said.

    Args:
        script: Its text.
        folder: Where it and its logs go.
        processes: How many.
        arguments: Of the script.
    """
    with started(script, folder, processes, *arguments) as family:
        codes = family.wait()
        assert codes == [0] * processes, family.said[-4000:]
        return family.said
