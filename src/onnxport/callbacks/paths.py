"""Where the model of a checkpoint lies, and whose model a file is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport._files import is_there
from onnxport.callbacks.remote import is_remote
from onnxport.exporter.ownership import read_metadata
from onnxport.pipeline.report_files import read_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.callbacks.remote import RemoteModels

__all__ = ["ModelPaths", "is_model_of", "model_path"]

_CHECKPOINT_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".safetensors"})


def model_path(
    checkpoint: str | Path, dirpath: Path | None = None, roots: Sequence[str | Path] = ()
) -> Path:
    """Return where the model of a checkpoint goes: beside it, same stem, ``.onnx``.

    Args:
        checkpoint: Path of the checkpoint.
        dirpath: Folder for all models. Where the model of another checkpoint has the name there
            already, a hash of the checkpoint's path follows it.
        roots: Folders of checkpoints; below ``dirpath``, a model has the same path as its
            checkpoint has below the first of them that holds it.

    Example:
        >>> model_path("runs/epoch=1-acc=0.95.ckpt").name
        'epoch=1-acc=0.95.onnx'
    """
    path = Path(checkpoint)
    stem = path.name.removesuffix(".index.json")  # of several files
    stem = Path(stem).stem if Path(stem).suffix in _CHECKPOINT_SUFFIXES else stem
    if dirpath is None:
        return path.parent / f"{stem}.onnx"
    parents = [path.relative_to(root).parent for root in roots if path.is_relative_to(root)]
    folder = dirpath / (parents[0] if parents else "")
    plain = folder / f"{stem}.onnx"
    unique = folder / f"{stem}-{_digest(path)}.onnx"
    if is_model_of(unique, path) or _is_taken(plain, path):
        return unique
    return plain


class ModelPaths:
    """Where the models of one run lie, those included that are on their way.

    Args:
        dirpath: See :func:`model_path`.
        roots: See :func:`model_path`.
        remote: Where models are made whose checkpoints are elsewhere.
    """

    def __init__(
        self,
        dirpath: Path | None = None,
        roots: Sequence[str | Path] = (),
        remote: RemoteModels | None = None,
    ) -> None:
        self._dirpath, self._roots, self._remote = dirpath, tuple(roots), remote
        self._known: dict[str, Path] = {}

    def of(self, checkpoint: str, suffix: str = "") -> Path:
        """Return where the model of a checkpoint goes; of one checkpoint always the same.

        Args:
            checkpoint: Path of the checkpoint.
            suffix: What is added to the model's stem.
        """
        path = self._of(checkpoint)
        path = path.with_name(f"{path.stem}{suffix}{path.suffix}")
        if self._remote is None or self._dirpath is not None or not is_remote(checkpoint):
            return path
        return self._remote.local(f"{checkpoint.rpartition('/')[0]}/{path.name}")

    def _of(self, checkpoint: str) -> Path:
        if self._dirpath is None:
            return model_path(checkpoint)
        if checkpoint not in self._known:
            path = model_path(checkpoint, self._dirpath, self._roots)
            rivals = [other for other, known in self._known.items() if known == path]
            if any(is_there(Path(other)) for other in rivals):
                path = path.with_name(f"{path.stem}-{_digest(Path(checkpoint))}{path.suffix}")
            self._known[checkpoint] = path
        return self._known[checkpoint]


def _digest(checkpoint: Path) -> str:
    absolute = os.path.abspath(checkpoint)  # noqa: PTH100 - links are not followed
    return hashlib.sha256(absolute.encode()).hexdigest()[:8]


def is_model_of(model: Path, checkpoint: Path) -> bool:
    """Tell whether a model of ours, or a report of a failed export, is of this checkpoint."""
    report = read_report(model)
    if report is not None and report.checkpoint is not None:
        recorded = Path(report.checkpoint)
        if recorded.name != checkpoint.name:
            return False
        # A folder may have been moved with everything in it.
        return model.parent == checkpoint.parent or recorded.absolute() == checkpoint.absolute()
    return read_metadata(model).get("checkpoint") == checkpoint.name


def _is_taken(model: Path, checkpoint: Path) -> bool:
    """Tell whether a name belongs to the model of another checkpoint, which is still there."""
    report = read_report(model)
    return (
        report is not None
        and report.checkpoint is not None
        and is_there(Path(report.checkpoint))
        and not is_model_of(model, checkpoint)
    )
