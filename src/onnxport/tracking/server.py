"""The process that speaks to tracking servers: ``python -m onnxport.tracking.server``.

It is told of jobs by lines on its standard input, and answers with lines on its standard output.
Everything else is on the disk, so it may end at any moment. It never imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from onnxport._signals import ignore
from onnxport.config import MLflow
from onnxport.tracking.base import RunAddress
from onnxport.tracking.courier import Courier

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxport.tracking.courier import Carried

__all__ = ["Server", "main"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0
"""How long a server that was down is left alone; each pause is twice as long as the one before."""
WATCH_S = 2.0
NICENESS = 19
"""Training comes first."""


class Server:
    """Carries out jobs in the order in which it is told of them, and failed ones again.

    Args:
        courier: Does the work.
        answer: Takes what came of a job, as plain values.
    """

    def __init__(self, courier: Courier, answer: Callable[[dict[str, Any]], None]) -> None:
        self._courier = courier
        self._answer = answer
        self._failed: dict[str, tuple[str, str]] = {}
        self._down: tuple[str, Carried] | None = None
        self._pause = FIRST_PAUSE_S
        self._next = 0.0

    def serve(self, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Serve for ever; whoever reads ends the process."""
        while True:
            try:
                message = inbox.get(timeout=self._patience())
            except queue.Empty:
                self._try_again()
                continue
            if "status" in message:
                self._end(message)
            elif "again" in message:
                self._down = None
            elif self._carry_out(message["job"], message["uri"], message["asked"]) and self._failed:
                self._try_again()  # it is up again

    def _patience(self) -> float | None:
        return max(0.0, self._next - time.monotonic()) if self._failed else None

    def _end(self, message: dict[str, Any]) -> None:
        options = MLflow(**message["address"]["options"])
        address = RunAddress(**message["address"] | {"options": options})
        self._courier.close(address, message["status"])
        self._answer({"ended": True})

    def _carry_out(self, path: str, uri: str, asked: str) -> bool:
        """Carry out a job, or say at once that its server was down a moment ago."""
        answer: dict[str, Any] = {"job": path, "asked": asked}
        first = not self._failed
        if self._down is not None and self._down[0] == uri and time.monotonic() < self._next:
            carried = self._down[1]  # but its token: that is another job's
        else:
            carried = self._courier.carry_out(Path(path), uri)
            self._down = (uri, carried) if carried.down else None
            self._failed.pop(path, None)  # if it fails again, it comes behind the others
            if carried.token or not carried.left:
                answer["token"] = carried.token
        if carried.left:
            if first or carried.down:
                self._next = time.monotonic() + self._pause
            self._failed[path] = (uri, asked)
        else:
            self._pause = FIRST_PAUSE_S
        record = None if carried.record is None else asdict(carried.record)
        self._answer(answer | {"record": record, "left": carried.left})
        return not carried.left

    def _try_again(self) -> None:
        """Try all that failed; what waits for a server that is still down is not tried."""
        self._down = None
        for path, (uri, asked) in list(self._failed.items()):
            self._carry_out(path, uri, asked)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        self._next = time.monotonic() + self._pause


def _read(source: TextIO, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in source:
        inbox.put(json.loads(line))
    os._exit(0)  # nobody waits for answers any more; what is left is on the disk


def _watch(parent: int) -> None:
    """End with the trainer: a child that it has forked may hold our standard input open."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(0)


def main() -> None:
    """Serve whoever is at the other end of standard input and output."""
    os.nice(NICENESS)
    ignore()
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, inbox), daemon=True).start()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(ImportError):  # each job would say so
        import mlflow.onnx  # noqa: F401 - takes seconds, now rather than when a model is there
    Server(Courier(), answer).serve(inbox)


if __name__ == "__main__":
    main()
