"""A sign of life from a server or database, before any call that could block for minutes.

MLflow's client retries a dead http server for 247 s and a dead database for longer; neither can be
told to give up sooner in the part that opens a database.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sqlite3
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from onnxport.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["can_be_asked", "new_database", "require_reachable"]

_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433}
_FREE_BYTES = 2**22
"""A fresh sqlite store of MLflow takes about 1 MB, and as much again for its journal."""


def require_reachable(uri: str, timeout_s: float) -> None:
    """Ask for a sign of life; the answer, a name server's included, is waited for this long.

    Args:
        uri: Tracking URI.
        timeout_s: In seconds.

    Raises:
        TrackingError: If there is none, or nothing can be written there.
    """
    probe = _probe_for(uri, timeout_s)
    if probe is None:
        return
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            probe()
        except Exception as error:  # noqa: BLE001 - drivers raise anything; it is raised again below
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="onnxport-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TrackingError(f"it does not answer within {timeout_s} s")
    error = outcome[0]
    if error is not None:
        raise TrackingError(f"it cannot be used ({getattr(error, 'reason', error)})") from error


def can_be_asked(uri: str) -> bool:
    """Tell whether there is a way to get a sign of life from such an address."""
    return _probe_for(uri, 0.0) is not None


def new_database(uri: str) -> Path | None:
    """Return the file of an sqlite database that is not there yet, or ``None``."""
    path = _file_of(uri)
    return None if path is None or path.exists() else path


def _file_of(uri: str) -> Path | None:
    parts = urlsplit(uri)
    name = parts.path.removeprefix("/")
    is_file = parts.scheme.partition("+")[0] == "sqlite" and name not in {"", ":memory:"}
    return Path(name) if is_file else None


def _probe_for(uri: str, timeout_s: float) -> Callable[[], None] | None:
    scheme = urlsplit(uri).scheme
    dialect = scheme.partition("+")[0]
    if scheme in {"http", "https"}:
        return lambda: _ask_http(uri, timeout_s)
    if dialect == "sqlite":
        return lambda: _ask_sqlite(uri, timeout_s)
    if dialect in _DATABASE_PORTS:
        with contextlib.suppress(ImportError):
            import sqlalchemy  # noqa: F401 - here, for importing it takes a part of the time
        return lambda: _ask_database(uri, dialect, timeout_s)
    return None


def _ask_http(uri: str, timeout_s: float) -> None:
    with contextlib.suppress(urllib.error.HTTPError):  # it answers: no such page, or a password
        parts = urlsplit(uri.rstrip("/"))
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        url = f"{bare}/health"
        urllib.request.urlopen(url, timeout=timeout_s).close()  # nosec # noqa: S310 - http(s) only


def _ask_sqlite(uri: str, timeout_s: float) -> None:
    """Write beside the database, and ask for its lock.

    Raises:
        TrackingError: If there is no room.
    """
    path = _file_of(uri)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
    free = shutil.disk_usage(path.parent).free
    if free < _FREE_BYTES:
        raise TrackingError(f"{path.parent} has only {free} bytes left")
    if path.exists():
        with contextlib.closing(sqlite3.connect(path, timeout=timeout_s / 2)) as connection:
            connection.isolation_level = None
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")


def _ask_database(uri: str, dialect: str, timeout_s: float) -> None:
    parts = urlsplit(uri)
    # Without a port, an address of SQL Server may be the name of a data source.
    if parts.hostname and (parts.port or dialect != "mssql"):
        address = (parts.hostname, parts.port or _DATABASE_PORTS[dialect])
        socket.create_connection(address, timeout=timeout_s).close()
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    engine.connect().close()
