"""Archives that ``torch.save`` has written, looked at before anything in them is believed."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["require_archive"]


def require_archive(path: Path, most_bytes: int | None = None) -> None:
    """Refuse what ``torch.save`` does not write, and what would take far more memory than disk.

    Only the archive's directory is read.

    Args:
        path: The file.
        most_bytes: How large it may be; ``None``: as it is.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is another file, is too large, or has parts that are packed or lie in one
            another.
    """
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"torch.save has not written it, or not all of it ({error})") from error
    # What is packed may be a thousand times as large as its file: torch.save packs nothing.
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are packed")
    if sum(part.file_size for part in parts) > size:
        raise ValueError("its parts are larger than the file")
