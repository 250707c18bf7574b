"""Which models are still to be made: noted beside the checkpoint until each of them is there.

A training run may be killed, or may not wait for its last models. Whoever comes next finds what is
owed, and makes it: the next fit, or :func:`~onnxport.resume`, which has no module and needs the
template and what the live module gave.
"""

from __future__ import annotations

import io
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport._files import (
    BEGUN,
    OWED,
    REFUSED,
    UNTOLD,
    Ticket,
    ending_of,
    hidden_below,
    is_there,
    replace_content,
    sweep_begun,
)
from onnxport.exporter.checkpoint_file import is_checkpoint
from onnxport.exporter.tied import tied_names
from onnxport.exporter.writer import STAGING
from onnxport.exporter.writer import sweep as sweep_staged
from onnxport.pipeline.blueprint_file import read_plain, reference_from, reference_of
from onnxport.report import Provenance
from onnxport.tracking.job import address_from, plain_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from onnxport.config import ExportOptions
    from onnxport.pipeline import ExportJob, LiveReference
    from onnxport.tracking.base import RunAddress

__all__ = [
    "NO_USE",
    "Owed",
    "SharedTemplate",
    "is_owed",
    "note",
    "note_anew",
    "owed",
    "settle",
    "sweep",
    "template_of",
    "template_path",
    "ticket",
    "used_below",
]

logger = logging.getLogger(__name__)

_TEMPLATE = ".onnxport-template"
NO_USE = "Remove its .pending file, and the model is owed no more."
"""What to do where nothing can be done."""
MAX_REFERENCE_BYTES = 16 * 2**20
"""What the live module gave is not written down if it is larger: training waits meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owed:
    """A model that is to be made.

    Args:
        model: Where it will lie.
        name: Of the target, as it is part of the model's name.
        origin: Where the weights come from.
        template: The template that belongs to it, or ``None``.
        reference: What the live module gave, or ``None``.
        fingerprint: What of the live module was no weight, or ``None``.
        options: How it is proven, as plain values.
        address: The run of a tracking server that it belongs to, or ``None``.
        tied: Names of each weight that has several, of which the checkpoint may know one.
        replaced: The checkpoint is another one than when this was noted, of which nothing is known.
    """

    model: Path
    name: str
    origin: Provenance
    template: Path | None = None
    reference: LiveReference | None = None
    fingerprint: dict[str, str] | None = None
    options: dict[str, Any] | None = None
    address: RunAddress | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    replaced: bool = False

    @property
    def checkpoint(self) -> Path:
        """The file with the weights: beside the model, where the folder may have been moved to."""
        recorded = Path(str(self.origin.checkpoint))
        beside = self.model.with_name(recorded.name or "?")
        return beside if is_checkpoint(beside) else recorded


def note(
    model: Path,
    name: str,
    origin: Provenance,
    job: ExportJob | None = None,
    address: RunAddress | None = None,
) -> bool:
    """Note that a checkpoint's model is on its way; a disk that refuses is no reason to stop.

    Args:
        model: Where the model will lie.
        name: Of the target, as it is part of the model's name.
        origin: Where the weights come from; without a checkpoint there is nothing to note.
        job: How it will be made, if that is known already.
        address: The run of a tracking server that it belongs to.

    Returns:
        Whether it is noted.
    """
    if origin.checkpoint is None:
        return False
    try:
        content: dict[str, Any] = {"name": name, "origin": json.dumps(asdict(origin))}
        if job is not None:
            live = getattr(job.source, "live", None)
            whole = job.template is not None and isinstance(job.target, str)
            content |= {
                "template": job.template.name if job.template is not None and whole else None,
                "reference": reference_of(job.reference, MAX_REFERENCE_BYTES),
                "fingerprint": json.dumps(job.fingerprint),
                "options": json.dumps(_proof_of(job.options)),
                "address": json.dumps(None if address is None else plain_address(address)),
                "tied": json.dumps(tied_names(live) if isinstance(live, nn.Module) else []),
                "saved": ending_of(Path(origin.checkpoint)),
            }
        model.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        torch.save(content, file)
        replace_content(_marker(model), file.getvalue())
    except Exception:  # a full disk, metrics that are no numbers
        logger.debug("%s is not noted as owed.", model, exc_info=True)
        return False
    return True


def note_anew(model: Path, name: str, checkpoint: str) -> bool:
    """Note that a checkpoint will be another one, or none: who makes its model stops then.

    What was noted of the older one must not be taken for the next, also where the disk refuses.

    Args:
        model: Where the model lies, or will lie.
        name: Of the target.
        checkpoint: Path of the checkpoint.

    Returns:
        Whether it is noted.
    """
    noted = note(model, name, Provenance(checkpoint=checkpoint))
    if not noted:
        settle(model)
    return noted


def ticket(model: Path) -> Ticket | None:
    """Return what is valid until the checkpoint of an owed model changes."""
    return Ticket.of(_marker(model))


def is_owed(model: Path) -> bool:
    """Tell whether a model is noted as owed."""
    return is_there(_marker(model))


def settle(model: Path) -> None:
    """The model is there, or will never be."""
    try:
        _marker(model).unlink(missing_ok=True)
    except OSError:  # the folder is no folder, or not ours to write to any more
        logger.debug("The marker of %s stays.", model, exc_info=True)


def owed(
    folders: Iterable[Path],
    name: str | None = None,
    unclear: Callable[[Path, str], None] = lambda _, __: None,
) -> Iterator[Owed]:
    """Yield the models that are owed for checkpoints that are still there.

    Args:
        folders: Where to look, and below.
        name: Of the target; ``None``: of any.
        unclear: Called with a model and the reason why it is not known what it should be.
    """
    for folder in dict.fromkeys(folders):
        for marker in sorted(hidden_below(folder, OWED)):
            try:
                found = _read(marker)
                there, gone = is_checkpoint(found.checkpoint), found.checkpoint.parent.is_dir()
            except Exception as error:
                logger.debug("%s says nothing.", marker, exc_info=True)  # damaged, or of others
                guessed = _by_its_name(_model(marker), name)
                if guessed is None:
                    unclear(_model(marker), f"{marker} is damaged ({type(error).__name__}).")
                else:
                    yield guessed
                continue
            if name not in {None, found.name}:
                continue
            if there:
                yield found
            elif gone:
                settle(found.model)
            else:
                unclear(found.model, f"Its checkpoint {found.checkpoint} is not there.")


def _by_its_name(model: Path, name: str | None) -> Owed | None:
    """Guess what a note has said that is damaged: its name tells the model, and the checkpoint."""
    if name is None or not model.stem.endswith(name):
        return None
    checkpoint = model.with_name(f"{model.stem.removesuffix(name)}.ckpt")
    if not is_checkpoint(checkpoint):
        return None
    return Owed(model=model, name=name, origin=Provenance(checkpoint=str(checkpoint)))


def template_path(model: Path, run: str) -> Path:
    """Return where the template of a run's models is kept while some of them are owed.

    Args:
        model: One of its models.
        run: Tells the run, and the target, from all others.
    """
    return model.with_name(f".{run}{_TEMPLATE}")


class SharedTemplate:
    """Gives the graph of a run's models to each folder where one is owed.

    A framework may have a folder for each checkpoint, and remove the one with the first model.

    Args:
        run: Tells the run, and the target, from all others.
    """

    def __init__(self, run: str) -> None:
        self._name = f".{run}{_TEMPLATE}"
        self._having: dict[Path, None] = {}
        self._lacking: dict[Path, None] = {}

    def noted(self, folder: Path) -> None:
        """Something is owed in a folder."""
        self._lacking[folder] = None
        self._share()

    def made(self, folder: Path) -> None:
        """A model was made in a folder, and its graph may lie there."""
        if is_there(folder / self._name):
            self._having[folder] = None
        self._share()

    def _share(self) -> None:
        having = reversed(list(self._having))
        source = next((folder for folder in having if is_there(folder / self._name)), None)
        if source is None:
            return
        for folder in list(self._lacking):
            self._lacking.pop(folder, None)
            try:
                if any(folder.glob(f".*{OWED}")) and not is_there(folder / self._name):
                    os.link(source / self._name, folder / self._name)
                self._having[folder] = None
            except OSError:  # it is gone, or a disk without links
                logger.debug("%s has no template.", folder, exc_info=True)


def template_of(debt: Owed, root: Path) -> Path | None:
    """Return the template of a model that is owed: beside it, or beside another one of its run."""
    if debt.template is None or debt.template.is_file():
        return debt.template
    beside = (folder / debt.template.name for folder in used_below(root))
    return next((path for path in beside if path.is_file()), debt.template)


def used_below(root: Path) -> Iterator[Path]:
    """Yield the folders in which there are hidden files of ours, a folder's own and all below."""
    for place, folders, names in os.walk(root):
        staged = [name for name in (*folders, *names) if name.startswith(STAGING)]
        folders[:] = [name for name in folders if name not in staged]  # somebody may work there
        marks = (OWED, UNTOLD, REFUSED, _TEMPLATE, BEGUN)
        if staged or any(name.startswith(".") and name.endswith(marks) for name in names):
            yield Path(place)


def sweep(folders: Iterable[Path], *, keep: bool = False) -> None:
    """Remove what was begun and will not be finished, and templates where nothing is owed.

    Args:
        folders: Where.
        keep: Leave the templates: models are owed elsewhere that need them.
    """
    for folder in dict.fromkeys(folders):
        try:
            sweep_begun(folder)
            sweep_staged(folder)
            if not keep and not any(folder.glob(f".*{OWED}")):
                for template in folder.glob(f".*{_TEMPLATE}"):
                    template.unlink(missing_ok=True)
        except OSError:
            logger.debug("The templates in %s stay.", folder, exc_info=True)


def _marker(model: Path) -> Path:
    return model.with_name(f".{model.name}{OWED}")


def _proof_of(options: ExportOptions) -> dict[str, Any]:
    verify = options.verify
    providers = verify.providers if verify.providers == "auto" else list(verify.providers)
    return {
        "tolerance": asdict(verify.tolerance),
        "providers": providers,
        "variants": [list(each) for each in options.variants],
        "gpu_memory_mb": verify.gpu_memory_mb,
    }


def _model(marker: Path) -> Path:
    return marker.with_name(marker.name[1 : -len(OWED)])


def _read(marker: Path) -> Owed:
    """Read a marker.

    Raises:
        ValueError: If it is none of ours.
        Exception: Whatever else is wrong with it.
    """
    content = read_plain(marker)
    origin = Provenance(**json.loads(content["origin"]))
    if not isinstance(origin.checkpoint, str) or not isinstance(content["name"], str):
        raise ValueError("it names no checkpoint")  # noqa: TRY004 - of what a file holds
    found = Owed(model=_model(marker), name=content["name"], origin=origin)
    if "reference" not in content:
        return found
    # Where a disk has refused a later note, this one is of what the checkpoint was before.
    if is_checkpoint(found.checkpoint) and content.get("saved") != ending_of(found.checkpoint):
        origin = Provenance(checkpoint=origin.checkpoint)
        return replace(found, origin=origin, replaced=True)
    template = content["template"]
    if template is not None and (
        Path(template).name != template or not template.endswith(_TEMPLATE)
    ):
        raise ValueError(f"{template!r} is no template")
    reference = content["reference"]
    address = json.loads(content.get("address", "null"))
    return replace(
        found,
        template=None if template is None else marker.with_name(template),
        reference=None if reference is None else reference_from(reference),
        fingerprint=json.loads(content["fingerprint"]),
        options=json.loads(content["options"]),
        tied=tuple(tuple(names) for names in json.loads(content.get("tied", "[]"))),
        address=None if address is None else address_from(address),
    )
