"""The page of a run: its history, written as models come, and the process that draws it."""

from __future__ import annotations

import logging
import os
import subprocess  # nosec - our own module, with a path of our own
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from onnxport._files import folder_to_start_in, sweep_begun
from onnxport._optional import is_available
from onnxport.page.history import HISTORY, append

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from onnxport.report import ExportReport, Provenance

__all__ = ["PAGE", "RunPage", "pages_are_wanted"]

logger = logging.getLogger(__name__)

PAGE = "onnxport.html"
"""Name of the page."""
PAUSE_S = 60.0
"""How long a page stays as it is, at least, while training goes on."""
VARIABLE = "ONNXPORT_PAGE"
"""Environment variable; ``0``: no run has a page unless the code says so."""


def pages_are_wanted(page: bool | None) -> bool:
    """Read the ``page`` argument of a callback.

    Args:
        page: What was given; ``None``: the environment decides.
    """
    return os.environ.get(VARIABLE) != "0" if page is None else page


class RunPage:
    """Keeps the history of one run, and lets another process draw its page now and then.

    None of its methods raises, or waits unless it says so.

    Args:
        folder: Of the run.
        anew: The run does not go on from an earlier one, whose history is removed.
        ready: Called with each page that was drawn.
    """

    def __init__(
        self, folder: Path, *, anew: bool, ready: Callable[[Path], None] = lambda _: None
    ) -> None:
        self._folder = folder
        self._ready = ready
        self._lock = threading.RLock()  # a signal's handler may save while it is held
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = time.monotonic()
        self._stale = self._refused = False
        self._draws = is_available("plotly") and is_available("jinja2")
        with suppress(OSError):
            sweep_begun(folder)
            if anew:
                (folder / HISTORY).unlink(missing_ok=True)

    def add(self, report: ExportReport, origin: Provenance) -> None:
        """Write down what became of a checkpoint.

        Args:
            report: Its report, as it is now.
            origin: Where its weights come from.
        """
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                append(self._folder / HISTORY, report, monitor=origin.monitor, mode=origin.mode)
            except OSError as error:
                text = "The history of this run cannot be written to %s: %s. Training goes on."
                level = logging.DEBUG if self._refused else logging.WARNING
                logger.log(level, text, self._folder, error)
                self._refused = True
                return
            self._stale = True
            drawn = self._collect()
            if self._process is None and time.monotonic() - self._begun >= PAUSE_S:
                self._draw("--nice")
        self._show(drawn)

    def finish(self, limit_s: float) -> None:
        """Training is over: wait for a page that shows all of it.

        Args:
            limit_s: How long at most, in seconds.
        """
        with self._lock:
            drawn = self._collect()
            if self._end():  # it lets everybody go first, and nobody is there any more
                self._stale = True
            if self._stale:
                self._draw()
            process = self._process
        self._show(drawn)
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
        with self._lock:
            drawn = self._collect()
            if self._end():
                text = "The page of this run took too long; `onnxport report %s` draws it."
                logger.warning(text, self._folder)
        self._show(drawn)

    def _show(self, drawn: bool) -> None:
        """Hand a page out, without the lock: whoever takes it may be about to add a report."""
        if drawn:
            self._ready(self._folder / PAGE)

    def _end(self) -> bool:
        """End the process, if there is one."""
        if self._process is None:
            return False
        self._process.kill()
        self._process.wait()
        self._process = None
        return True

    def _collect(self) -> bool:
        """Tell whether a page has been drawn meanwhile."""
        if self._process is None or self._process.poll() is None:
            return False
        code, self._process = self._process.returncode, None
        if code:
            logger.debug("The page was not drawn: exit code %s", code)
        return code == 0

    def _draw(self, *options: str) -> None:
        if not self._draws:
            return
        self._stale, self._begun = False, time.monotonic()
        # Of its own session: Ctrl-C is meant for training.
        command = [sys.executable, "-m", "onnxport.page", str(self._folder), *options]
        try:
            self._process = subprocess.Popen(  # noqa: S603 # nosec - see the import
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder_to_start_in(),
                start_new_session=True,
            )
        except OSError:
            logger.debug("The page cannot be drawn", exc_info=True)
