"""Which models are still to be made: noted beside the checkpoint until each of them is there.

A training run may be killed, or may not wait for its last models. Whoever comes next finds what is
owed, and makes it: the next fit, or :func:`~onnxport.resume`, which has no module and needs the
template and what the live module gave.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnxport.pipeline.blueprint_file import read_plain, reference_from, reference_of
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from onnxport.config import ExportOptions
    from onnxport.pipeline import LiveReference

__all__ = ["Owed", "note", "owed", "settle", "sweep", "template_path"]

logger = logging.getLogger(__name__)

_SUFFIX = ".pending"
MAX_REFERENCE_BYTES = 16 * 2**20
"""What the live module gave is not written down if it is larger: training waits meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owed:
    """A model that is to be made.

    Args:
        model: Where it will lie.
        name: Of the target, as it is part of the model's name.
        origin: Where the weights come from.
        reference: What the live module gave, or ``None``.
        options: How it is proven, as plain values.
    """

    model: Path
    name: str
    origin: Provenance
    reference: LiveReference | None = None
    options: dict[str, Any] | None = None

    @property
    def checkpoint(self) -> Path:
        """The file with the weights, also where its folder was moved with everything in it."""
        recorded = Path(self.origin.checkpoint or "")
        moved = self.model.with_name(recorded.name)
        return moved if moved.is_file() and not recorded.is_file() else recorded


def note(
    model: Path,
    name: str,
    origin: Provenance,
    reference: LiveReference | None = None,
    options: ExportOptions | None = None,
) -> None:
    """Note that a checkpoint's model is on its way; a disk that refuses is no reason to stop.

    Args:
        model: Where the model will lie.
        name: Of the target, as it is part of the model's name.
        origin: Where the weights come from; without a checkpoint there is nothing to note.
        reference: What the live module gave.
        options: How the model is to be proven.
    """
    if origin.checkpoint is None:
        return
    marker = _marker(model)
    begun = marker.with_name(f"{marker.name}.tmp")
    try:
        content = {
            "name": name,
            "origin": json.dumps(asdict(origin)),
            "options": None if options is None else json.dumps(_proof_of(options)),
            "reference": reference_of(reference, MAX_REFERENCE_BYTES),
        }
        model.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, begun)
        begun.replace(marker)
    except Exception:  # a full disk, metrics that are no numbers
        logger.debug("%s is not noted as owed.", model, exc_info=True)


def settle(model: Path) -> None:
    """The model is there, or will never be."""
    try:
        _marker(model).unlink(missing_ok=True)
    except OSError:  # the folder is no folder, or not ours to write to any more
        logger.debug("The marker of %s stays.", model, exc_info=True)


def owed(folders: Iterable[Path], name: str | None = None) -> Iterator[Owed]:
    """Yield the models that are owed for checkpoints that are still there.

    Args:
        folders: Where to look, and below.
        name: Of the target; ``None``: of any.
    """
    for folder in dict.fromkeys(folders):
        for marker in sorted(folder.rglob(f".*{_SUFFIX}")) if folder.is_dir() else ():
            found = _read(marker)
            if found is None or name not in {None, found.name}:
                continue
            if found.checkpoint.is_file():
                yield found
            else:
                settle(found.model)


def template_path(model: Path, name: str) -> Path:
    """Return where the template of a run's models is kept while some of them are owed."""
    return model.with_name(f".onnxport{name}.template")


def sweep(templates: Iterable[Path]) -> None:
    """Remove the templates of folders where nothing is owed any more."""
    for template in templates:
        try:
            if not any(template.parent.glob(f".*{_SUFFIX}")):
                template.unlink(missing_ok=True)
        except OSError:
            logger.debug("%s stays.", template, exc_info=True)


def _marker(model: Path) -> Path:
    return model.with_name(f".{model.name}{_SUFFIX}")


def _proof_of(options: ExportOptions) -> dict[str, Any]:
    verify = options.verify
    providers = verify.providers if verify.providers == "auto" else list(verify.providers)
    return {"tolerance": asdict(verify.tolerance), "providers": providers}


def _read(marker: Path) -> Owed | None:
    """Read a marker; one that was half-written says nothing."""
    try:
        content = read_plain(marker)
        reference = content["reference"]
        return Owed(
            model=marker.with_name(marker.name[1 : -len(_SUFFIX)]),
            name=str(content["name"]),
            origin=Provenance(**json.loads(content["origin"])),
            reference=None if reference is None else reference_from(reference),
            options=None if content["options"] is None else json.loads(content["options"]),
        )
    except Exception:  # a damaged file raises anything
        logger.debug("%s says nothing.", marker, exc_info=True)
        return None
