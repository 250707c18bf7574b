"""What a machine has for making models, what of it really runs, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from onnxport.config import Background
from onnxport.errors import OnnxportError
from onnxport.tracking import reachable
from onnxport.tracking.base import without_password
from onnxport.validation.providers import (
    idle_providers,
    providers_on_request,
    resolve_providers,
)
from onnxport.validation.session import runtime_version
from onnxport.worker.process import WorkerProcess

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Finding", "diagnose"]

logger = logging.getLogger(__name__)

_PACKAGES = (
    *("onnxport", "torch", "onnx", "onnxscript", "onnx-ir", "numpy", "lightning"),
    *("pytorch-lightning", "onnxruntime", "onnxruntime-gpu", "mlflow", "mlflow-skinny"),
)
_SLOW_START_S = 60.0
_FEW_FILES = 256
_LITTLE_DISK, _LITTLE_MEMORY = 2**30, 2**30
_SLOW_SYNC_S = 1.0
_SHARED_BYTES = 2**26
_SERVER_LIMIT_S = 5.0
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: Its name.
        found: What there is, in words.
        ok: Whether models can be made with it.
        advice: What to do if not; ``""`` if there is nothing to be done.
    """

    what: str
    found: str
    ok: bool = True
    advice: str = ""


def diagnose(
    folder: str | os.PathLike[str] = ".", *, tracking_uri: str | None = None
) -> list[Finding]:
    """Look at versions, providers, the worker, the disk, memory, limits and the tracking server.

    A worker process is started for it and ended again, and a small file is written and removed.

    Args:
        folder: Where models will go.
        tracking_uri: Of the server; default: ``MLFLOW_TRACKING_URI``, if it is set.

    Returns:
        What was found, in this order; whatever goes wrong on the way is a finding, too.

    Example:
        >>> from onnxport.doctor import diagnose
        >>> findings = diagnose()
        >>> [finding.what for finding in findings if not finding.ok]
        []
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    looks: dict[str, tuple[Callable[[], Iterator[Finding]], str]] = {
        "versions": (_versions, "Install onnxport anew: what is installed cannot be read."),
        "ONNX Runtime": (_runtime, "Without it no model is proven: pip install 'onnxport[ort]'."),
        "worker": (_worker, "Use OnnxExport(background=False) until it starts; see the error."),
        "disk": (lambda: _disk(Path(folder)), "Give a folder, or a name that is free."),
        "memory": (_memory, "Weights cannot be shared with the worker: is memory limited here?"),
        "limits": (_limits, "The limits of this process cannot be read."),
        "MLflow": (lambda: _server(uri), "Look at the address: MLFLOW_TRACKING_URI."),
    }
    found: list[Finding] = []
    for what, (look, advice) in looks.items():
        try:
            found += look()
        except Exception as error:  # it is what was looked for
            logger.debug("%s could not be looked at", what, exc_info=True)
            name = "" if isinstance(error, OnnxportError) else f"{type(error).__name__}: "
            found.append(Finding(what, f"{name}{error}", ok=False, advice=advice))
    return [replace(each, advice="") if each.ok else each for each in found]


def _versions() -> Iterator[Finding]:
    installed = []
    for name in _PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("system", f"{platform.platform()}, Python {platform.python_version()}")
    yield Finding("versions", ", ".join(installed))


def _runtime() -> Iterator[Finding]:
    running = ", ".join(resolve_providers("auto"))
    yield Finding("ONNX Runtime", f"{runtime_version()}; models run with {running}")
    for name in providers_on_request():
        yield Finding(name, "runs here; models are proven on it where Verify(providers=) names it")
    for name in idle_providers():
        yield Finding(
            name,
            "is in the package and does not run here",
            ok=False,
            advice="Its device or its libraries are missing; without them, use onnxruntime.",
        )


def _worker() -> Iterator[Finding]:
    start = time.perf_counter()
    process = WorkerProcess(Background())
    try:
        process.wait_until_ready()
        took = time.perf_counter() - start
        held = _resident_bytes(process.pid)
    finally:
        process.kill()
    memory = "" if held is None else f", holds {held / 2**20:.0f} MiB"
    yield Finding(
        "worker",
        f"starts in {took:.1f} s{memory}",
        ok=took < _SLOW_START_S,
        advice="Importing torch is slow here: is the environment on a network disk?",
    )


def _resident_bytes(pid: int) -> int | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _disk(folder: Path) -> Iterator[Finding]:
    place, there = folder.absolute(), _existing(folder)
    free = shutil.disk_usage(there).free
    new = "" if there == place else f"; {place} will be made by training"
    yield Finding(
        "disk",
        f"{_size(free)} are free in {there}{new}",
        ok=free >= _LITTLE_DISK,
        advice="Free some space, or give another folder with dirpath=.",
    )
    try:
        took = _write_in(there)
    except OSError as error:
        advice = "Free some space, make the folder writable, or give another one with dirpath=."
        yield Finding("writing", f"{there}: {error.strerror}", ok=False, advice=advice)
        return
    yield Finding(
        "writing",
        f"1 MiB is on the disk in {took * 1e3:.0f} ms; files can be locked and renamed",
        ok=took < _SLOW_SYNC_S,
        advice="The disk is slow. Training does not wait for it, but the end of fit may.",
    )


def _existing(folder: Path) -> Path:
    """Return a folder, or the next one above it that is there already.

    Raises:
        NotADirectoryError: If a file is in its way.
    """
    place = folder.absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file")
    return there


def _size(number: float) -> str:
    return f"{number / _GIB:.1f} GiB" if number >= _GIB else f"{number / 2**20:.0f} MiB"


def _write_in(folder: Path) -> float:
    """Write, lock and rename a file as a model is; return how long it took, in seconds."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
        file = Path(scratch) / "file"
        with FileLock(f"{file}.lock", timeout=0):
            start = time.perf_counter()
            with file.open("wb") as opened:
                opened.write(bytes(2**20))
                opened.flush()
                os.fsync(opened.fileno())
            file.replace(file.with_suffix(".there"))
            return time.perf_counter() - start


def _memory() -> Iterator[Finding]:
    free = _available_bytes()
    if free is not None:
        yield Finding(
            "memory",
            f"{free / _GIB:.1f} GiB are free",
            ok=free >= _LITTLE_MEMORY,
            advice="The worker takes 0.6 GiB and the weights. Background(memory_gb=) limits it.",
        )
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("onnxport-doctor")
        try:
            os.posix_fallocate(descriptor, 0, _SHARED_BYTES)
        finally:
            os.close(descriptor)
        yield Finding("shared memory", "weights can be shared with the worker")
    else:
        yield Finding("shared memory", "none; weights are handed over in temporary files")


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _limits() -> Iterator[Finding]:
    yield Finding("cores", f"{len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count()}")
    if resource is None:
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding(
        "open files",
        "no limit" if files == resource.RLIM_INFINITY else f"{files} at most",
        ok=files == resource.RLIM_INFINITY or files >= _FEW_FILES,
        advice="Raise the limit: ulimit -n 4096.",
    )


_HAS_AFFINITY = hasattr(os, "sched_getaffinity")


def _server(uri: str) -> Iterator[Finding]:
    if not uri:
        yield Finding("MLflow", "no address is given; what the trainer's MLFlowLogger has is used")
        return
    place = without_password(uri)
    if (new := reachable.new_database(uri)) is not None:
        _write_in(_existing(new.parent))
        yield Finding("MLflow", f"{new} is not there yet; the first run makes it")
        return
    if not reachable.can_be_asked(uri):
        yield Finding("MLflow", f"{place} was not asked: it is no http(s) address, nor a database")
        return
    try:
        reachable.require_reachable(uri, _SERVER_LIMIT_S)
    except OnnxportError as error:
        advice = "Models are made all the same, and `onnxport sync FOLDER` tells the server later."
        yield Finding("MLflow", f"{place}: {error}", ok=False, advice=advice)
    else:
        yield Finding("MLflow", f"{place} answers")
