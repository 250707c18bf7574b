"""Where a training shows its models: a tracking server, and the page of the run."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from onnxport.callbacks.page import RunPage
from onnxport.callbacks.sync import keep_record
from onnxport.callbacks.training import never_raises
from onnxport.tracking.base import place_of
from onnxport.tracking.job import Job, jobs_in, model_of
from onnxport.tracking.outbox import InlineOutbox, ProcessOutbox, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from onnxport.callbacks.settings import Settings
    from onnxport.callbacks.training import Training
    from onnxport.tracking.base import RunAddress
    from onnxport.tracking.outbox import Outbox

__all__ = ["Announced"]

logger = logging.getLogger(__name__)

PAGE_S = 30.0
"""How long the end of training waits for the page of the run."""


class Announced:
    """The server and the page of one training.

    Args:
        settings: What the callback was told.
        training: What its adapter knows; ``None``: there are none.

    Attributes:
        address: Which run models are tracked in, or ``None``.
        outbox: Takes what a server is to be told, or ``None``.
        page: Shows what becomes of each checkpoint, or ``None``.
    """

    def __init__(self, settings: Settings, training: Training | None) -> None:
        self.address: RunAddress | None = None
        self.outbox: Outbox | None = None
        self.page: RunPage | None = None
        self._inline = settings.background is None
        if training is None or not training.leaves_files:
            return
        if settings.mlflow is not None:
            self._open_outbox(training)
        if settings.page and training.page is not None:
            anew = not training.goes_on
            self.page = RunPage(training.page, anew=anew, ready=self._attach)

    def _open_outbox(self, training: Training) -> None:
        try:
            self.address = training.address()
        except Exception as error:
            logger.exception("The MLflow run could not be found. Training goes on.")
            self.outbox = Unavailable(f"The MLflow run could not be found: {error}")
            return
        if self.address is not None:
            self.outbox = (InlineOutbox if self._inline else ProcessOutbox)(self.address)

    def _attach(self, page: Path) -> None:
        """Show the page in the run of a tracking server."""
        if self.address is not None and self.outbox is not None:
            place = place_of(page)
            job = Job(model=page.absolute(), place=place, address=self.address, attached=True)
            self.outbox.submit(job, lambda _: None)

    def adopt(self, folders: Iterable[Path]) -> None:
        """Tell the server what an earlier training could not tell its own.

        Args:
            folders: Of models.
        """
        if self.outbox is not None:
            for job in jobs_in(folders):
                self.outbox.adopt(job, partial(keep_record, model_of(job)))

    def finish(self, limit_s: float, *, failed: bool) -> None:
        """Wait until the server and the page show all models.

        Args:
            limit_s: How long at most, in seconds.
            failed: Training was ended by an error.
        """
        end = time.monotonic() + max(0.0, limit_s)
        self._drain(end)
        if self.page is not None:  # by now it can say what the server holds
            with never_raises("the page of the run"):
                left = PAGE_S if self._inline else end - time.monotonic()
                self.page.finish(min(PAGE_S, max(0.0, left)))
            self._drain(end)
        if self.outbox is not None:
            with never_raises("the end of tracking"):
                self.outbox.close("FAILED" if failed else "FINISHED")

    def _drain(self, end: float) -> None:
        if self.outbox is not None:
            with never_raises("the end of tracking"):
                self.outbox.drain(max(0.0, end - time.monotonic()), lambda _: None)
