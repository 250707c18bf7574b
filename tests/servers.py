"""Real servers for tests: on loopback, started and ended here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START_LIMIT_S = 120.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def answering(
    answer: Callable[[BaseHTTPRequestHandler], None], *, healthy: bool = True
) -> Iterator[str]:
    """Run a server that answers each request like this; yield its address.

    Args:
        answer: Called with each request.
        healthy: ``/health`` is answered well, and at once.
    """

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if healthy and self.path == "/health":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"OK")
            else:
                answer(self)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - names of http.server

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def bad_server(delay_s: float = 0.0, *, healthy: bool = False) -> Iterator[str]:
    """Run a server that answers 500, late; yield its address.

    Args:
        delay_s: How late.
        healthy: See :func:`answering`.
    """

    def late(request: BaseHTTPRequestHandler) -> None:
        time.sleep(delay_s)
        request.send_response(500)
        request.end_headers()

    with answering(late, healthy=healthy) as uri:
        yield uri


@contextmanager
def mlflow_server(
    store: str, folder: Path, *options: str, port: int = 0, **env: str
) -> Iterator[str]:
    """Run MLflow over HTTP for the block, artifacts through its proxy; yield its address.

    Args:
        store: Address of its database.
        folder: Where it keeps artifacts and its log.
        options: More arguments.
        port: Where it listens; 0: anywhere.
        env: More environment.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", store]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    # Seven more processes for jobs that nobody gives it.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | env
    with running(command, f"http://127.0.0.1:{port}", "health", folder / "server.log", environment):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(
    command: list[str], uri: str, ready: str, log: Path, environment: dict[str, str]
) -> Iterator[None]:
    """Run a server for the block, once it answers; all its processes end with it.

    Args:
        command: What starts it.
        uri: Where it answers.
        ready: The path that is asked.
        log: Where its output goes.
        environment: Its variables.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_for(f"{uri}/{ready}", process, log)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def ask(uri: str, body: Any) -> Any:
    """Ask a served model; return its predictions."""
    request = urllib.request.Request(
        f"{uri}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


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


def postgres_folder() -> Path | None:
    """Return where PostgreSQL's programs are; ``None``: it is not installed."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    return None if found is None else Path(found).parent


@contextmanager
def postgres(programs: Path) -> Iterator[str]:
    """Run PostgreSQL for the block, in a folder of its own; yield the address of an empty database.

    Args:
        programs: Where ``initdb`` and ``postgres`` are.

    Raises:
        RuntimeError: If it does not start.
    """
    port = free_port()
    # It refuses to run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="onnxport-pg-") as folder:
        if user:
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"
        # Another folder than the tests' own, which that user may not enter.
        init = [programs / "initdb", "-D", data, "-U", "onnxport", "--auth=trust", "-E", "UTF8"]
        subprocess.run([*user, *map(str, init)], check=True, capture_output=True, cwd="/")
        command = [str(programs / "postgres"), "-D", data, "-p", str(port), "-k", folder]
        with (Path(folder) / "log").open("w") as log:
            server = subprocess.Popen([*user, *command], stdout=log, stderr=log, cwd="/")
            try:
                ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
                while subprocess.run(ready, check=False, capture_output=True).returncode:
                    if server.poll() is not None:
                        raise RuntimeError(Path(log.name).read_text())
                    time.sleep(0.1)
                yield f"postgresql+psycopg2://onnxport@127.0.0.1:{port}/postgres"
            finally:
                stop = [str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop"]
                subprocess.run([*user, *stop], check=False, capture_output=True, cwd="/")
                server.wait(timeout=30)
