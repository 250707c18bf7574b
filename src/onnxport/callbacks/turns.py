"""One model after the other, even where a signal's handler saves in the middle of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Turns"]


class Turns:
    """Keeps work of one thread from being begun inside of other such work.

    A cluster's warning makes a trainer save at any moment, also while a model is made: exporting is
    no work that can be begun in its own middle, so what is asked for then comes right after it.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiting: list[Callable[[], None]] = []

    def take(self, work: Callable[[], None]) -> None:
        """Do work now, or, if other work has been interrupted for this, when that is done."""
        self._waiting.append(work)
        # A signal may come between any two of these lines; what it adds is found by either loop.
        while self._waiting and not self._busy:
            self._busy = True
            try:
                while self._waiting:
                    self._waiting.pop(0)()
            finally:
                self._busy = False
