"""What a tracker is: the pipeline's side of any tracking server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from onnxport._files import MOST_BYTES, require_inside
from onnxport.config import MLflow

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from onnxport.report import ExportReport, Provenance, TrackingRecord

__all__ = [
    "Model",
    "ModelChangedError",
    "RunAddress",
    "Tracker",
    "identity_of",
    "place_of",
    "without_password",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAddress:
    """Which run models belong to.

    Args:
        uri: Address of the server or database.
        run_id: The run; ``None``: start one.
        experiment_id: Its experiment; ``None`` together with ``run_id``.
        artifact_root: Where a new experiment keeps its artifacts; ``None``: the server's default.
        metric_prefix: What the logger puts before the names of metrics, separator included.
        fit: Tells a run that we start from all others.
        options: Registry options.
    """

    uri: str
    run_id: str | None = None
    experiment_id: str | None = None
    artifact_root: str | None = None
    metric_prefix: str = ""
    fit: str = ""
    options: MLflow = field(default_factory=MLflow)

    @property
    def waits_for_best(self) -> bool:
        """Whether the best model is to be told at the end of training."""
        return self.options.policy == "end"

    def named(self, suffix: str) -> RunAddress:
        """Return the same run for models of another name.

        Args:
            suffix: What follows the registered model's name.
        """
        register = self.options.register
        name = None if register is None else f"{register}{suffix}"
        return replace(self, options=replace(self.options, register=name))


class ModelChangedError(Exception):
    """A file is not what was proven: a newer model has its name, or it is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A proven model, as it lies in a file.

    Args:
        path: The file.
        place: Names the place where it was made, see :func:`place_of`; files may be moved.
        report: Its report.
        origin: Its metrics, and which one decides what is best.
        identity: Of its file, see :func:`identity_of`.
        row: One row for each input, by name.
    """

    path: Path
    place: str
    report: ExportReport
    origin: Provenance
    identity: tuple[int, int]
    row: Mapping[str, np.ndarray[Any, Any]] | None = None

    @classmethod
    def of_file(
        cls,
        path: Path,
        report: ExportReport,
        origin: Provenance,
        row: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Model | None:
        """Return the model in a file that was just made; ``None``: it is gone already."""
        identity = identity_of(path)
        if identity is None:
            return None
        return cls(
            path=path.absolute(),
            place=place_of(path),
            report=report,
            origin=origin,
            identity=identity,
            row=row,
        )

    @property
    def companions(self) -> list[Path]:
        """Files that its users need, of those that its origin names; links elsewhere are none."""
        found = []
        for name in self.origin.beside:
            file = self.path.with_name(Path(name).name)
            if file.is_file() and not file.is_symlink() and file.stat().st_size <= MOST_BYTES:
                found.append(file)
        return found

    def require_unchanged(self) -> None:
        """Make sure that the file is what was proven, and is there itself.

        Raises:
            ModelChangedError: If it is another one.
            UnsafeFileError: If it, or the file of its weights, is a link out of its folder.
        """
        if identity_of(self.path) != self.identity:
            raise ModelChangedError(f"{self.path} is not the file that was proven.")
        for file in (self.path, self.path.with_name(f"{self.path.name}.data")):
            if file.exists():
                require_inside(file)


def place_of(path: Path) -> str:
    """Name the place of a model, whatever characters its path has."""
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return what tells a model's file from others of its name; ``None``: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Tracker(Protocol):
    """Brings proven models to a server; each call may be repeated after any failure."""

    def publish(self, model: Model, *, last: bool) -> TrackingRecord:
        """Bring one proven model to the server.

        Args:
            model: The model.
            last: Whether this is the best model at the end of training.

        Returns:
            What the server holds now.

        Raises:
            Exception: Whatever the server, its client and its transport raise.
        """
        ...

    def remove(self, place: str) -> None:
        """Take what belongs to a model that was removed from the server.

        Args:
            place: Where it was made.

        Raises:
            Exception: As above.
        """
        ...

    def attach(self, file: Path) -> None:
        """Show a file with the run; one of its name is replaced. Without a run, do nothing.

        Args:
            file: The file.

        Raises:
            Exception: As above.
        """
        ...

    def close(self, status: str) -> None:
        """End a run that the tracker itself started.

        Args:
            status: ``"FINISHED"`` or ``"FAILED"``.

        Raises:
            Exception: As above.
        """
        ...


def without_password(uri: str) -> str:
    """Return an address that may be shown.

    Example:
        >>> without_password("postgresql://me:secret@host:5432/db")
        'postgresql://me@host:5432/db'
    """
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=user.partition(":")[0] + at + host).geturl() if at else uri
