"""The end of training waits for models that are not finished, and shows what it waits for."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from onnxport.callbacks.session import ExportSession

__all__ = ["drain"]

SAY_EVERY_S = 15.0
"""How often a line says what is waited for where there is no progress bar."""


def drain(
    sessions: Mapping[str, ExportSession],
    limit_s: float,
    say: Callable[[str], None],
    *,
    in_rich: bool = False,
) -> None:
    """Wait for the models of all sessions.

    Args:
        sessions: The sessions of a run.
        limit_s: How long at most, in seconds, for all of them together.
        say: Tells the user a line.
        in_rich: Show the waiting in rich, as the framework's own progress bar is.
    """
    end = time.monotonic() + limit_s
    with ExitStack() as stack:
        tell: Callable[[list[str]], None] | None = None
        for session in sessions.values():
            if tell is None and session.unfinished:
                tell = _shown(stack, say, in_rich=in_rich)
            session.drain(max(0.0, end - time.monotonic()), tell or _nothing)


def _nothing(_: list[str]) -> None:
    """Show nothing."""


def _shown(
    stack: ExitStack, say: Callable[[str], None], *, in_rich: bool
) -> Callable[[list[str]], None]:
    """Return what shows the stages: in rich where the framework's bar is, else a line at times."""
    if in_rich:
        from rich.console import Console

        status = stack.enter_context(Console().status("onnxport"))
        return lambda stages: status.update(_text(stages))
    last, said = time.monotonic(), ""

    def tell(stages: list[str]) -> None:
        nonlocal last, said
        text = _text(stages)
        if time.monotonic() - last >= SAY_EVERY_S and text != said:
            last, said = time.monotonic(), text
            say(text)

    return tell


def _text(stages: list[str]) -> str:
    count = f"{len(stages)} models are" if len(stages) > 1 else "one model is"
    return f"onnxport: {count} not finished ({stages[0] if stages else 'done'})"
