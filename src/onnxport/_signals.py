"""Signals that are meant for training and reach every process of a job.

A terminal sends Ctrl-C to a whole group. A cluster warns each process of a job that its time is
over (SIGTERM, or with SLURM's requeue SIGUSR1 and whatever else was agreed on), and a signal that
nobody handles ends a process. What becomes of training is the trainer's decision: processes that
work for it go on, and end with it.
"""

from __future__ import annotations

import signal
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["held_back", "ignore", "is_of_handler"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")
_FOR_TRAINING = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}
_CAN_WAIT = hasattr(signal, "pthread_sigmask")  # not on Windows


@contextmanager
def held_back() -> Iterator[None]:
    """Start a process in here: signals wait for it until it calls :func:`ignore`."""
    if not _CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_TRAINING)  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_of_handler(error: BaseException) -> bool:
    """Tell whether a handler of a signal has raised an error, whatever it has interrupted."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    # Objects that can be called are handlers, too: Lightning's calls those that were there before.
    calls = [*handlers, *(vars(type(handler)).get("__call__") for handler in handlers)]
    codes = {getattr(call, "__code__", None) for call in calls}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def ignore() -> None:
    """Ignore such signals in this process from now on, and those that wait since it started."""
    for number in _FOR_TRAINING:
        signal.signal(number, signal.SIG_IGN)
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_TRAINING)
