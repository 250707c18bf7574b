"""One worker process, seen from the trainer: started, spoken to, ended."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from onnxport._events import event
from onnxport._files import folder_to_start_in
from onnxport._signals import held_back
from onnxport.errors import WorkerError
from onnxport.worker.protocol import Ready, Setup, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxport.config import Background

__all__ = ["WorkerProcess"]

START_LIMIT_S = 300.0
"""Importing torch from a cold network disk may take minutes."""

_TAIL = 2000
"""Characters of what a dead worker printed that are shown."""


class WorkerProcess:
    """A running worker.

    Args:
        options: How it should live.
        preload: Modules that it will need.

    Attributes:
        known: For each session, which skeleton, calls and blueprint it has.
    """

    def __init__(self, options: Background, preload: Iterable[str] = ()) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        threads = str(options.threads)
        # Before torch is imported there is no other way to keep its pools small. Memory for large
        # tensors comes in large pages: these are there in a third of the time.
        environment = (
            {"THP_MEM_ALLOC_ENABLE": "1"}
            | os.environ
            | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        )
        with ExitStack() as undo:
            undo.enter_context(theirs)
            undo.callback(ours.close)
            undo.callback(self._stderr.close)
            with held_back():
                self._process = subprocess.Popen(  # nosec # noqa: S603 - our own module
                    [sys.executable, "-m", "onnxport.worker.server", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    env=environment,
                    cwd=folder_to_start_in(),
                    start_new_session=True,
                )
            undo.pop_all()
            theirs.close()
        self._channel = ours
        event("worker.started", worker=self._process.pid)
        memory = options.memory_gb
        # Whoever gets no memory ends by any signal: as many libraries, as many ways.
        self._limit = (
            "" if memory is None else f" It may use {memory:g} GB (Background(memory_gb=))."
        )
        setup = Setup(
            sys_path=tuple(sys.path),
            threads=options.threads,
            niceness=options.niceness,
            memory_bytes=None if memory is None else int(memory * 2**30),
            log_level=logging.getLogger("onnxport").getEffectiveLevel(),
            preload=tuple(preload),
        )
        try:
            send(ours, setup)
        except OSError as error:
            raise self.death("while it started") from error
        self._ready = False

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until it has imported what it needs.

        Raises:
            WorkerError: If it is gone.
        """
        while not self._ready:
            self._ready = isinstance(self.receive(START_LIMIT_S), Ready)

    def send(self, message: Any, descriptors: tuple[int, ...] = ()) -> None:
        """Send a job, when the worker is ready for it.

        Raises:
            WorkerError: If it is gone.
        """
        self.wait_until_ready()
        try:
            self._channel.settimeout(START_LIMIT_S)
            send(self._channel, message, descriptors)
        except OSError as error:
            raise self.death("before it got its work") from error

    def receive(self, limit_s: float) -> Any:
        """Wait for a message.

        Raises:
            WorkerError: If the worker is gone, or says nothing for so long.
        """
        self._channel.settimeout(limit_s)
        try:
            message = receive(self._channel)
        except TimeoutError:
            self.kill()
            event("worker.died", worker=self._process.pid, cause="it said nothing for too long")
            raise WorkerError(
                f"The worker said nothing for {limit_s:g} s and was ended. "
                "Background(stage_timeout_s=) sets how long a stage may take."
            ) from None
        except (OSError, EOFError) as error:
            raise self.death("at work") from error
        if message is None:
            raise self.death("at work")
        return pickle.loads(message[0])  # nosec # noqa: S301 - our process, by a private socket

    def death(self, when: str) -> WorkerError:
        """End what is left of the process and say how it ended."""
        self._channel.close()
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            code = 0
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        words = self._last_words()
        self.kill()
        event("worker.died", worker=self._process.pid, when=when, cause=cause)
        return WorkerError(f"The worker process ended {when} ({cause}).{self._limit}{words}")

    def _last_words(self) -> str:
        if self._stderr.closed:
            return ""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _TAIL))
        text = self._stderr.read().decode(errors="replace").strip()
        return f" It last said: {text}" if text else ""

    def end(self) -> None:
        """End the process; the thread that waits for its words sees that it is gone."""
        self._process.kill()

    def kill(self) -> None:
        """End the process at once, and wait until it is gone."""
        self._channel.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._stderr.close()

    def close(self) -> None:
        """End an idle process: it leaves when its socket is closed."""
        self._channel.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.kill()
        self._stderr.close()
        event("worker.ended", worker=self._process.pid)
