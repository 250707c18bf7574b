"""Notes for a folder of models that takes none: they lie beside the checkpoints meanwhile.

With ``dirpath=``, models are on another disk than checkpoints, perhaps, and that disk may refuse
everything until training is over. Then an older model keeps its name although its checkpoint is
another one, and what is owed can be noted nowhere there. The next fit learns it from these notes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport._files import REFUSED, hidden_below, is_there, read_small, replace_content
from onnxport.callbacks.owed import is_owed, note
from onnxport.callbacks.paths import is_model_of
from onnxport.exporter.checkpoint_file import is_checkpoint
from onnxport.exporter.ownership import cannot_be_read
from onnxport.exporter.writer import remove_model, withdraw_model, withdraw_staged
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Refused", "hand_in", "keep", "refused"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A note that the folder of a model has refused.

    Args:
        file: Where it lies.
        model: Where the model would lie, or an older one does.
        checkpoint: Of which it is.
        name: Of the target, as it is part of the model's name.
    """

    file: Path
    model: Path
    checkpoint: Path
    name: str


def keep(model: Path, name: str, checkpoint: str) -> Path | None:
    """Note beside a checkpoint that its model is owed, and that an older one may have its name.

    Args:
        model: Where the model would lie.
        name: Of the target, as it is part of the model's name.
        checkpoint: Path of the checkpoint.

    Returns:
        The note; ``None`` where the folder is the same, is none of a file system, or refuses it.
    """
    absolute, beside = (Path(os.path.abspath(path)) for path in (model, checkpoint))  # noqa: PTH100 - links are not followed
    if absolute.parent == beside.parent or not is_there(beside.parent):
        return None
    digest = hashlib.sha256(str(absolute).encode()).hexdigest()[:8]
    file = beside.with_name(f".{model.name}.{digest}{REFUSED}")
    content = {"model": str(absolute), "checkpoint": str(beside), "name": name}
    try:
        replace_content(file, json.dumps(content).encode())
    except OSError:
        logger.debug("%s is not noted as owed anywhere.", model, exc_info=True)
        return None
    return file


def refused(folders: Iterable[Path]) -> Iterator[Refused]:
    """Yield the notes in folders of checkpoints, and below, that tell of a model."""
    for folder in dict.fromkeys(folders):
        for file in sorted(hidden_below(folder, REFUSED)):
            try:
                content = json.loads(read_small(file))
                model, checkpoint = Path(content["model"]), Path(content["checkpoint"])
                # The folder may have been moved with everything in it.
                beside = file.with_name(checkpoint.name)
                found = Refused(file=file, model=model, checkpoint=beside, name=content["name"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                logger.debug("%s says nothing.", file, exc_info=True)
            else:
                yield found


def hand_in(folders: Iterable[Path], name: str) -> None:
    """Write down where they belong the notes that were refused, and take older models away.

    Args:
        folders: Of checkpoints and of models; what lies elsewhere is not touched, whatever a file
            says.
        name: Of the target.
    """
    folders = [folder.absolute() for folder in folders]
    for found in refused(folders):
        inside = any(found.model.resolve().is_relative_to(root.resolve()) for root in folders)
        if found.name != name or not inside:
            continue
        try:
            if _hand_in(found):
                found.file.unlink()
        except OSError:
            logger.debug("%s stays.", found.file, exc_info=True)


def _hand_in(found: Refused) -> bool:
    """Tell whether the note is of no more use.

    Raises:
        OSError: If the disk still refuses.
    """
    ours = is_model_of(found.model, found.checkpoint)
    if not is_checkpoint(found.checkpoint):
        if ours:
            remove_model(found.model)
        return True
    if is_owed(found.model):  # by what this run has noted already
        return True
    if not ours and is_there(found.model):  # somebody else's, as far as it can be read
        return not cannot_be_read(found.model)
    if not note(found.model, found.name, Provenance(checkpoint=str(found.checkpoint))):
        return False
    withdraw_staged(found.model)
    if ours:
        withdraw_model(found.model)
    return True
