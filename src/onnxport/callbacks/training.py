"""What an adapter knows of a training, as values."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from onnxport.pipeline import Validation
    from onnxport.tracking.base import RunAddress

__all__ = ["Training", "Weights", "never_raises"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What an adapter knows when training begins.

    Args:
        module: The module in training.
        root: Folder of the run; may be a URL.
        roots: Folders of checkpoints, as far as they are known.
        address: Finds the run of a tracking server; ``None``: there is none. May raise.
        page: Folder of the run's page; ``None``: the run has none.
        goes_on: It goes on from a checkpoint: the page does, too.
        place: What follows the names of the models; ``None``: another callback has them.
        is_ours: Tells whether a model is none of another callback of this training.
        is_redirected: Tells whether a call of the module is not what it seems.
        fallback: Gives an example when no call was observed, or ``None``.
        labels: Names the arguments of a module's ``forward`` that a deployed model does not get.
        say: Tells the user a line.
        in_rich: The framework shows its progress in rich.
        leaves_files: ``False``: a rehearsal, which keeps and tracks nothing.
    """

    module: nn.Module
    root: str
    roots: Sequence[str] = ()
    address: Callable[[], RunAddress | None] = lambda: None
    page: Path | None = None
    goes_on: bool = False
    place: str | None = ""
    is_ours: Callable[[Path], bool] = lambda _: True
    is_redirected: Callable[[nn.Module], bool] = lambda _: False
    fallback: Callable[[], Any] = lambda: None
    labels: Callable[[nn.Module], Collection[str]] = lambda _: ()
    say: Callable[[str], None] = logger.info
    in_rich: bool = False
    leaves_files: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights that were saved, or that are there when training ends.

    Args:
        state: The whole ``state_dict``.
        origin: Where they come from.
        file: A file that holds them as ``torch.save`` writes it, or ``None``.
        whole: Returns what stands for a module that is spread over processes, or ``None``; may
            raise whatever copying the user's attributes raises.
        validation: Gives what the model is validated with, or ``None``; asked once.
    """

    state: Mapping[str, Any]
    origin: Provenance = field(default_factory=Provenance)
    file: Path | None = None
    whole: Callable[[], nn.Module | None] = lambda: None
    validation: Callable[[], Validation | None] = lambda: None


@contextmanager
def never_raises(what: str) -> Iterator[None]:
    """The framework is inside of a save, or at its end: log the error and go on.

    What an export can raise is in its report already; this is for user code and the framework.
    """
    try:
        yield
    except Exception:
        logger.exception("onnxport failed at %s. Training goes on.", what)
