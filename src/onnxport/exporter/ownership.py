"""Whose file is it: what a model says about itself, read without its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, BinaryIO

import onnx

from onnxport._files import MOST_BYTES, read_small

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["METADATA_PREFIX", "cannot_be_read", "is_our_report", "is_ours", "read_metadata"]

METADATA_PREFIX = "onnxport."
"""What stands before our keys in a model's ``metadata_props``."""

_METADATA_FIELD = 14
"""``ModelProto.metadata_props``. Source: onnx.proto."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MOST_FIELDS = 100_000
"""At the top of a file: a handful, opsets, functions and metadata."""
_REPORT_KEYS = frozenset({"ok", "attempts", "checks", "error"})


def read_metadata(path: Path) -> dict[str, str]:
    """Read what we wrote about a model, without our prefix; nothing if it is none of ours.

    Only the top level of the file is walked; the graph, which holds the weights, is skipped.
    """
    found: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for content in _metadata_fields(file, path.stat().st_size):
                entry = onnx.StringStringEntryProto.FromString(content)
                if entry.key.startswith(METADATA_PREFIX):
                    found[entry.key.removeprefix(METADATA_PREFIX)] = entry.value
    except Exception:  # noqa: BLE001 - whatever it is, it is no model: OSError, protobuf's own errors
        return {}
    return found


def is_ours(path: Path) -> bool:
    """Tell whether a file is a whole model that onnxport wrote."""
    return bool(read_metadata(path))


def cannot_be_read(path: Path) -> bool:
    """Tell whether a file is there, and the disk does not let anybody see whose it is."""
    try:
        with path.open("rb") as file:
            for _ in _metadata_fields(file, path.stat().st_size):
                pass
    except FileNotFoundError:
        return False
    except OSError:
        return True
    except ValueError:  # it can be read, and is no model
        return False
    return False


def is_our_report(path: Path) -> bool:
    """Tell whether a file is a report of any version of onnxport."""
    try:
        content = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= _REPORT_KEYS


def _metadata_fields(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Walk the fields of a protobuf message.

    Raises:
        ValueError: If it is none, ends in the middle of a field, or has more than a model can have.
    """
    fields = held = 0
    while file.tell() < size:
        fields += 1
        if fields > _MOST_FIELDS or held > MOST_BYTES:
            raise ValueError("no model has so many fields, or so much metadata")
        number, kind = divmod(_varint(file), 8)
        if kind == _VARINT:
            _varint(file)
            continue
        length = {_LENGTH: -1, _FIXED64: 8, _FIXED32: 4}.get(kind)
        if length is None:
            raise ValueError("there is no such kind of field")
        length = _varint(file) if length < 0 else length
        if file.tell() + length > size:
            raise ValueError("the file ends in the middle of a field")
        if number == _METADATA_FIELD and kind == _LENGTH:
            held += length
            yield file.read(min(length, MOST_BYTES))
        else:
            file.seek(length, 1)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("the file ends in the middle of a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:  # noqa: PLR2004 - the last byte of a number has no high bit
            return value
    raise ValueError("a number is too long")
