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
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport._files import (
    BEGUN,
    REFUSED,
    hidden_below,
    is_there,
    read_small,
    replace_content,
    sweep_begun,
)
from onnxport.callbacks.owed import note
from onnxport.callbacks.paths import is_model_of
from onnxport.callbacks.remote import is_remote
from onnxport.exporter.checkpoint_file import is_checkpoint
from onnxport.exporter.ownership import cannot_be_read
from onnxport.exporter.writer import remove_model, withdraw_model, withdraw_staged
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Refused", "hand_in", "keep", "may_be_there", "refused"]

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"\.(?P<model>.+)\.(?P<digest>[0-9a-f]{{8}}){re.escape(REFUSED)}", re.DOTALL)
_CHECKPOINT = ".ckpt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A note that the folder of a model has refused.

    Args:
        file: Where it lies.
        checkpoint: Of which the model is; beside the note.
        before: Where the checkpoint was then; another path if folders were moved.
        model: Name of the model's file.
        name: Of the target, as it is part of the model's name; ``None``: the note is damaged, and
            the checkpoint is guessed from its name.
        digest: Tells where the model would lie.
        relative: The same, seen from the folder of the checkpoint; ``""``: not known.
    """

    file: Path
    checkpoint: Path
    before: Path
    model: str
    name: str | None
    digest: str
    relative: str

    def is_about(self, model: Path) -> bool:
        """Tell whether this is the place of the model, also if folders were moved together."""
        there = os.path.abspath(model)  # noqa: PTH100 - links are not followed
        moved = os.path.normpath(self.file.parent.absolute() / self.relative)
        return _digest(there) == self.digest or (self.relative != "" and moved == there)


def keep(model: Path, name: str, checkpoint: str) -> Path | None:
    """Note beside a checkpoint that its model is owed, and that an older one may have its name.

    Args:
        model: Where the model would lie.
        name: Of the target, as it is part of the model's name.
        checkpoint: Path of the checkpoint, which need not be there yet.

    Returns:
        The note; ``None`` where the folder is the same, is none of a file system, or refuses it.
    """
    there, beside = (os.path.abspath(path) for path in (model, checkpoint))  # noqa: PTH100 - see above
    folder = Path(beside).parent
    if is_remote(checkpoint) or Path(there).parent == folder:
        return None
    file = folder / f".{model.name}.{_digest(there)}{REFUSED}"
    relative = os.path.relpath(there, folder)
    content = {"checkpoint": beside, "name": name, "model": relative}
    try:
        folder.mkdir(parents=True, exist_ok=True)  # the first save makes it, too
        replace_content(file, json.dumps(content).encode())
    except OSError:
        logger.debug("%s is not noted as owed anywhere.", model, exc_info=True)
        return None
    return file


def refused(folders: Iterable[Path]) -> Iterator[Refused]:
    """Yield the notes in folders of checkpoints, and below; what has other names is passed over."""
    for folder in dict.fromkeys(folders):
        for file in sorted(hidden_below(folder, REFUSED)):
            named = _NAME.fullmatch(file.name)
            if named is not None:
                yield _read(file, named["model"], named["digest"])


def _read(file: Path, model: str, digest: str) -> Refused:
    checkpoint, name, relative = "", None, ""
    try:
        content = json.loads(read_small(file))
        found = content["checkpoint"], content["name"], content["model"]
        if all(isinstance(each, str) and "\0" not in each for each in found):
            checkpoint, name, relative = found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        logger.debug("%s says nothing.", file, exc_info=True)  # a power failure has emptied it
    before = Path(checkpoint or file.with_name(f"{Path(model).stem}{_CHECKPOINT}"))
    return Refused(
        file=file,
        checkpoint=file.with_name(before.name or "?"),
        before=before,
        model=model,
        name=name,
        digest=digest,
        relative=relative,
    )


def hand_in(
    folders: Iterable[Path],
    name: str,
    model_of: Callable[[str], Path],
    is_known: Callable[[Path, Path], bool],
) -> None:
    """Write down where they belong the notes that were refused, and take older models away.

    Args:
        folders: Of checkpoints.
        name: Of the target.
        model_of: Where this run has the model of a checkpoint. A note of another place is left
            alone, whatever it says.
        is_known: Called with a model and its note: whether this run has taken care of it.
    """
    folders = list(folders)
    for place in {path.parent for each in folders for path in hidden_below(each, REFUSED + BEGUN)}:
        sweep_begun(place)
    for found in refused(folders):
        try:
            model = model_of(str(found.checkpoint))
            if found.name not in {None, name} or not found.is_about(model):
                continue
            if not is_known(model, found.file) and _hand_in(found, model, name):
                found.file.unlink()
        except (OSError, ValueError, RuntimeError):  # also a link to itself
            logger.debug("%s stays.", found.file, exc_info=True)


def _hand_in(found: Refused, model: Path, name: str) -> bool:
    """Tell whether the note is of no more use.

    Raises:
        OSError: If the disk still refuses.
    """
    ours = any(is_model_of(model, path) for path in (found.checkpoint, found.before))
    if not is_checkpoint(found.checkpoint):
        if ours:
            remove_model(model)
        return ours or not cannot_be_read(model)
    if not ours and is_there(model):  # somebody else's, as far as it can be read
        return not cannot_be_read(model)
    if not note(model, name, Provenance(checkpoint=str(found.checkpoint))):
        return False
    withdraw_staged(model)
    if ours:
        withdraw_model(model)
    return True


def may_be_there(path: Path) -> bool:
    """Tell whether a file is there, or the disk does not say."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        logger.debug("Whether there is %s is not known.", path, exc_info=True)
    return True


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:8]
