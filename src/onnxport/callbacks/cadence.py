"""When to export: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxport.errors import ConfigurationError

__all__ = ["Cadence", "When", "read_when"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cadence:
    """Which checkpoints become models.

    Args:
        every_n_checkpoints: Export the first checkpoint written and then each n-th; 0: none of
            them, only the one at the end.
        at_end: Make sure that the best checkpoint (or the final weights, when there is no
            checkpointing) has a model when training ends.

    Raises:
        ConfigurationError: If nothing would ever be exported, or n is negative.

    Example:
        >>> [Cadence(every_n_checkpoints=2).should_export(count) for count in (0, 1, 2)]
        [True, False, True]
    """

    every_n_checkpoints: int = 1
    at_end: bool = True

    def __post_init__(self) -> None:
        if self.every_n_checkpoints < 0 or (not self.every_n_checkpoints and not self.at_end):
            raise ConfigurationError(
                "Cadence(every_n_checkpoints=) must be at least 0, and above 0 unless at_end is "
                f"true; got {self.every_n_checkpoints!r}."
            )

    def should_export(self, count: int) -> bool:
        """Decide for the checkpoint that comes after ``count`` others."""
        return self.every_n_checkpoints > 0 and count % self.every_n_checkpoints == 0


When = Literal["checkpoint", "end"] | Cadence


def read_when(when: When) -> Cadence:
    """Read the ``when`` argument of a callback.

    Raises:
        ConfigurationError: If it is none of the choices.
    """
    if isinstance(when, Cadence):
        return when
    if when == "checkpoint":
        return Cadence()
    if when == "end":
        return Cadence(every_n_checkpoints=0)
    raise ConfigurationError(f"when must be 'checkpoint', 'end' or Cadence(...); got {when!r}.")
