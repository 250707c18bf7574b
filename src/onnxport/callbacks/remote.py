"""Checkpoints on a remote file system: their models are made here, and then put beside them.

ONNX Runtime reads files, and an object store has none. A model is made in a folder of this machine;
once it is proven its files are copied to where the checkpoint is, the model after what it refers
to, so that whoever finds the model finds it whole. ``fsspec`` writes, as it does for Lightning.
"""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from onnxport.exporter.writer import DATA_SUFFIX, REPORT_SUFFIX, model_files, report_path
from onnxport.pipeline.report_files import save_report

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from onnxport.report import ExportReport

__all__ = ["RemoteModels", "is_remote", "remote_exists"]

logger = logging.getLogger(__name__)

_LOCAL = frozenset({"file", "local"})
_CHUNK_BYTES = 2**22


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path names something that is not on this machine's file system.

    Example:
        >>> is_remote("s3://bucket/run"), is_remote("runs/last.ckpt")
        (True, False)
    """
    protocol, separator, _ = str(path).partition("://")
    return bool(separator) and protocol not in _LOCAL


def remote_exists(url: str) -> bool:
    """Tell whether there is something at a URL; what cannot be asked is not there."""
    try:
        system, path = _Systems().of(url)
        return bool(system.exists(path))
    except Exception:  # any file system, with errors of its own
        logger.debug("%s cannot be asked for", url, exc_info=True)
        return False


class RemoteModels:
    """Models of checkpoints on remote file systems.

    Args:
        home: The folder of this machine where they are made.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._urls: dict[Path, str] = {}
        self._systems = _Systems()
        self._turn = threading.RLock()

    def local(self, url: str) -> Path:
        """Return where a file is made that belongs at a URL.

        Args:
            url: Of a model.
        """
        folder, _, name = url.rpartition("/")
        path = self._home / quote(folder, safe="") / name
        self._urls[path] = url
        return path

    def url(self, model: Path) -> str | None:
        """Return where a model belongs; ``None``: where it is made."""
        return self._urls.get(model)

    def deliver(self, report: ExportReport, model: Path) -> ExportReport | None:
        """Copy a proven model and its report to where they belong.

        Args:
            report: Its report.
            model: The model on this machine.

        Returns:
            The report, which names the place; or that of a failure; or ``None``: the checkpoint was
            removed meanwhile, and so is the model.
        """
        url = self.url(model)
        if url is None:
            return report
        placed = replace(report, path=url)
        failure: Exception | None = None
        try:
            save_report(placed, model)
            folder = url.rpartition("/")[0]
            for file in (*reversed(model_files(model)), report_path(model)):
                self._put(file, f"{folder}/{file.name}")
        except Exception as error:  # noqa: BLE001 - any file system, with errors of its own
            failure = error
        if not model.exists():
            self.remove(model)
            return None
        if failure is None:
            return placed
        text = (
            f"The model is proven and lies in {model}, but could not be put beside its checkpoint, "
            f"at {url}: {type(failure).__name__}: {failure}"
        )
        return replace(report, ok=False, error=text)

    def update(self, model: Path) -> None:
        """Copy a report that has changed."""
        url = self.url(model)
        if url is None or not model.exists():
            return
        try:
            self._put(report_path(model), f"{url}{REPORT_SUFFIX}")
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("The report of %s could not be renewed: %s", url, error)

    def remove(self, model: Path) -> None:
        """Remove what was put beside a checkpoint."""
        url = self.url(model)
        if url is None:
            return
        folder = url.rpartition("/")[0]
        names = (model.name, f"{model.name}{DATA_SUFFIX}", report_path(model).name)
        for place in (f"{folder}/{name}" for name in names):
            try:
                system, path = self._systems.of(place)
                if system.exists(path):
                    system.rm_file(path)
            except Exception as error:  # noqa: BLE001 - as above
                logger.warning("%s was not removed with its checkpoint: %s", place, error)

    def _put(self, file: Path, url: str) -> None:
        """Copy a file; it is there as a whole or not at all."""
        with self._turn:
            system, path = self._systems.of(url)
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.transaction, system.open(path, "wb") as target, file.open("rb") as source:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)


class _Systems:
    """File systems of our own.

    Those that ``fsspec`` caches are shared by all threads, and with them their transaction: one
    that is begun here would end the one with which the trainer writes a checkpoint.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def of(self, url: str) -> tuple[Any, str]:
        """Return the file system of a URL, and the path in it."""
        from fsspec.core import url_to_fs

        place = "/".join(url.split("/", 3)[:3])
        if place not in self._known:
            self._known[place], _ = url_to_fs(url, skip_instance_cache=True)
        system = self._known[place]
        return system, str(system._strip_protocol(url))  # noqa: SLF001 - as fsspec.core does
