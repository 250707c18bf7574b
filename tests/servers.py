"""Real servers for tests: on loopback, started and ended here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_LIMIT_S = 120.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(store: str, folder: Path, *options: str, **env: str) -> Iterator[str]:
    """Run MLflow over HTTP for the block, artifacts through its proxy; yield its address.

    Args:
        store: Address of its database.
        folder: Where it keeps artifacts and its log.
        options: More arguments.
        env: More environment.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", store]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    # Seven more processes for jobs that nobody gives it.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | env
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            uri = f"http://127.0.0.1:{port}"
            wait_for(f"{uri}/health", process, log)
            yield uri
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers, whatever it answers.

    Raises:
        RuntimeError: If it ends, or does not.
    """
    end = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError):
            with suppress(urllib.error.HTTPError):  # it wants a password
                urllib.request.urlopen(url, timeout=1).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"no server at {url}: {log.read_text()[-3000:]}")
