"""How long each stage of a job took, and which one it is in."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Stopwatch"]


class Stopwatch:
    """Measures stages.

    Args:
        tell: Called when a stage begins, with its name and the rung that is tried, if any.

    Attributes:
        seconds: Duration of each stage so far.
    """

    def __init__(self, tell: Callable[[str, str | None], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.tell = tell

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a stage; stages inside of it count for themselves."""
        self.tell(name, None)
        start, inside = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - inside
            passed = time.perf_counter() - start - inner
            self.seconds[name] = self.seconds.get(name, 0.0) + passed
