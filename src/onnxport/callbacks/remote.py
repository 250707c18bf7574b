"""Checkpoints on a remote file system: their models are made here, and then put beside them.

ONNX Runtime reads files, and an object store has none. A model is made in a folder of this machine;
once it is proven its files are copied to where the checkpoint is, the model after what it refers
to, so that whoever finds the model finds it whole. ``fsspec`` writes, as it does for Lightning.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path
from typing_extensions import override

from onnxport._files import DATA_SUFFIX, is_there
from onnxport.config import VARIANTS
from onnxport.errors import PublishError
from onnxport.exporter.writer import REPORT_SUFFIX, model_files, report_path, variant_path
from onnxport.pipeline.report_files import save_report
from onnxport.report import ExportReport

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from onnxport.report import Variant

__all__ = ["RemoteModels", "folder_here", "is_remote", "remote_exists", "short_name"]

logger = logging.getLogger(__name__)

_LOCAL = frozenset({"file", "local"})
_CHUNK_BYTES = 2**22
_READABLE = 60
"""Characters of a URL that its folder here is named after."""


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


def short_name(url: str) -> str:
    """Return the name of a folder that stands for a URL, and for no other one."""
    readable = re.sub(r"[^\w.=-]+", "-", url, flags=re.ASCII)[-_READABLE:].lstrip(".-")
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def folder_here(root: str) -> Path:
    """Return a folder of this machine for a run: its own, or one in a cache."""
    return (
        user_cache_path("onnxport") / "runs" / short_name(root) if is_remote(root) else Path(root)
    )


class RemoteModels:
    """Models of checkpoints on remote file systems.

    Args:
        home: The folder of this machine where they are made.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._urls: dict[Path, str] = {}
        self._systems = _Systems()
        self._writing = _Systems()  # what training removes must not wait for what is written
        self._turn = threading.Lock()

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteModels, (self._home,)

    def local(self, url: str) -> Path:
        """Return where a file is made that belongs at a URL.

        Args:
            url: Of a model.
        """
        folder, _, name = url.rpartition("/")
        path = self._home / short_name(folder) / name
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
        try:
            self._require_ours(url)
            self._remove_variants(url)
            placed = replace(placed, variants=tuple(self._placed(url, report.variants)))
            save_report(placed, model)
            self._put_all(model, url)
            for variant in placed.variants:
                if variant.path is not None:
                    self._put(variant_path(model, variant.name), variant.path)
        except Exception as error:  # any file system, with errors of its own
            logger.debug("%s could not be put there", url, exc_info=True)
            placed = replace(
                report,
                ok=False,
                error=(
                    f"The model is proven and lies in {model}, but could not be put beside its "
                    f"checkpoint, at {url}: {type(error).__name__}: {error}"
                ),
            )
        if not is_there(model):
            self.remove(model)
            return None
        if not placed.ok:
            self.remove(model)  # an older model would hold other weights
            save_report(placed, model)
        return placed

    def update(self, model: Path) -> None:
        """Copy a report that has changed."""
        url = self.url(model)
        if url is None or not is_there(model):
            return
        try:
            self._put(report_path(model), f"{url}{REPORT_SUFFIX}")
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("The report of %s could not be renewed: %s", url, error)
        if not is_there(model):
            self.remove(model)

    def remove(self, model: Path, checkpoint: str | None = None) -> None:
        """Remove what was put beside a checkpoint; files of somebody else stay.

        Args:
            model: The model on this machine, which may be gone.
            checkpoint: If given, the model of another checkpoint stays, too.
        """
        url = self.url(model)
        if url is None:
            return
        try:
            report = self._report(url)
            if report is None or checkpoint not in {None, report.checkpoint}:
                return
            self._remove_variants(url)
            for suffix in ("", DATA_SUFFIX, REPORT_SUFFIX):
                self._remove(f"{url}{suffix}")
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("%s was not removed with its checkpoint: %s", url, error)

    def _put_all(self, model: Path, url: str) -> None:
        # The report is first, because it says whose the others are. A graph must not be found
        # beside the data of another one.
        self._put(report_path(model), f"{url}{REPORT_SUFFIX}")
        files = model_files(model)
        data = model.with_name(model.name + DATA_SUFFIX)
        if data in files:
            self._remove(url)
            self._put(data, f"{url}{DATA_SUFFIX}")
        self._put(model, url)
        if data not in files:
            self._remove(f"{url}{DATA_SUFFIX}")

    def _placed(self, url: str, variants: Iterable[Variant]) -> Iterator[Variant]:
        """Say where the variants of a model will lie; those whose name is taken, nowhere."""
        for variant in variants:
            if variant.path is None:
                yield variant
                continue
            path = _variant_url(url, variant.name)
            system, name = self._systems.of(path)
            if system.exists(name):
                error = f"{path} was not written by onnxport and is left alone."
                yield replace(variant, ok=False, path=None, bytes=None, error=error)
            else:
                yield replace(variant, path=path)

    def _remove_variants(self, url: str) -> None:
        """Remove the children of the model that is there, as its report names them."""
        report = self._report(url)
        for variant in () if report is None else report.variants:
            if variant.path is not None and variant.name in VARIANTS:
                self._remove(_variant_url(url, variant.name))

    def _require_ours(self, url: str) -> None:
        """Make sure that a name is free, or taken by a model of ours.

        Raises:
            PublishError: If a file of somebody else is there.
        """
        system, path = self._systems.of(url)
        taken = system.exists(path) or system.exists(f"{path}{REPORT_SUFFIX}")
        if taken and self._report(url) is None:
            raise PublishError(f"{url} was not written by onnxport and is left alone.")

    def _report(self, url: str) -> ExportReport | None:
        """Read the report of a model that is there; ``None``: there is none of ours."""
        system, path = self._systems.of(url)
        try:
            return ExportReport.from_json(system.cat_file(f"{path}{REPORT_SUFFIX}").decode())
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _remove(self, url: str) -> None:
        system, path = self._systems.of(url)
        if system.exists(path):
            system.rm_file(path)

    def _put(self, file: Path, url: str) -> None:
        """Copy a file; it is there as a whole or not at all."""
        with self._turn:  # a file system has one transaction
            system, path = self._writing.of(url)
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.transaction, system.open(path, "wb") as target, file.open("rb") as source:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _variant_url(url: str, name: str) -> str:
    folder, _, model = url.rpartition("/")
    return f"{folder}/{variant_path(Path(model), name).name}"


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
        system.invalidate_cache()  # others write there
        return system, str(system._strip_protocol(url))  # noqa: SLF001 - as fsspec.core does
