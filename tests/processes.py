"""A script that several processes run together, as on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_S = 240


def together(script: str, folder: Path, processes: int, *arguments: str) -> str:
    """Run a script in several processes that know of each other; return what they said.

    Args:
        script: Its text.
        folder: Where it and its logs go.
        processes: How many.
        arguments: Of the script.
    """
    file = folder / "train.py"
    file.write_text(script)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world = meet | {"WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(processes)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(file), *arguments],
            env=os.environ | world | {"LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=LIMIT_S) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            log.close()
    said = "".join((folder / f"{rank}.log").read_text() for rank in range(processes))
    assert codes == [0] * processes, said[-4000:]
    return said
