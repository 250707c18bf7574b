"""Look for files in folders that somebody may be working in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["hidden_below"]


def hidden_below(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield the hidden files with a suffix in a folder and below; none, if it is no folder.

    Folders that vanish meanwhile are passed over, where ``Path.rglob`` would raise.
    """
    for place, _, names in os.walk(folder):
        yield from (
            Path(place) / name for name in names if name.startswith(".") and name.endswith(suffix)
        )
