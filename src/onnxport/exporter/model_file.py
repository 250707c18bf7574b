"""Write a model tensor by tensor, and find the tensors in one again without loading it.

A protobuf message is its fields, one after the other, each with a tag and a length; that is enough
to write the weights straight to where they belong, and to read where they lie. Nothing here holds
more than one tensor.

Source: protobuf's encoding (protobuf.dev/programming-guides/encoding), ``onnx.proto3``.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx

from onnxport.errors import PublishError
from onnxport.exporter.tensors import raw_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from io import RawIOBase
    from pathlib import Path

    import torch

    from onnxport.exporter.template import Slot

__all__ = ["mapped_twin", "twin_of", "write_external", "write_inline"]

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of ``ModelProto.graph``, ``GraphProto.initializer``, ``TensorProto.raw_data``."""

_LENGTH_DELIMITED = 2
SMALL_BYTES = 4096
"""Tensors below this stay in the graph of a twin."""
_ALIGNMENT = 4096
"""Of external data; what ONNX's own writer gives, so that each tensor can be mapped."""


def write_inline(
    file: RawIOBase,
    head: bytes,
    graph: bytes,
    slots: Sequence[Slot],
    tensors: Iterable[torch.Tensor],
) -> None:
    """Write a model with the weights in it, as they come.

    Args:
        file: Where to write.
        head: A serialised ``ModelProto`` without its graph.
        graph: A serialised ``GraphProto`` without the initializers of the slots.
        slots: What the tensors are.
        tensors: One for each slot, in order; contiguous, on the CPU.
    """
    openings = [_opening(slot) for slot in slots]
    size = len(graph) + sum(
        len(opening) + slot.nbytes for opening, slot in zip(openings, slots, strict=True)
    )
    _write(file, head + _tag(_GRAPH) + _varint(size) + graph)
    for opening, slot, tensor in zip(openings, slots, tensors, strict=True):
        _write(file, opening)
        _write(file, _checked(slot, tensor))


def write_external(
    file: RawIOBase,
    data: RawIOBase,
    location: str,
    head: bytes,
    graph: bytes,
    slots: Sequence[Slot],
    tensors: Iterable[torch.Tensor],
) -> None:
    """Write a model with the weights in a second file.

    Args:
        file: Where the graph goes.
        data: Where the weights go.
        location: Name of that file beside the first.
        head: See :func:`write_inline`.
        graph: See :func:`write_inline`.
        slots: See :func:`write_inline`.
        tensors: See :func:`write_inline`.
    """
    initializers, offset = [], 0
    for slot in slots:
        offset += -offset % _ALIGNMENT
        proto = _proto(slot)
        _make_external(proto, location, offset, slot.nbytes)
        raw = proto.SerializeToString()
        initializers.append(_tag(_INITIALIZER) + _varint(len(raw)) + raw)
        offset += slot.nbytes
    size = len(graph) + sum(map(len, initializers))
    _write(file, head + _tag(_GRAPH) + _varint(size) + graph + b"".join(initializers))
    for slot, tensor in zip(slots, tensors, strict=True):
        _write(data, b"\0" * (-data.tell() % _ALIGNMENT))
        _write(data, _checked(slot, tensor))


def _write(file: RawIOBase, content: bytes | memoryview) -> None:
    """Write all of it: past 2 GB one call of the system takes only a part."""
    rest = memoryview(content)
    while rest.nbytes:
        rest = rest[file.write(rest) or 0 :]


@contextmanager
def twin_of(path: Path) -> Iterator[Path]:
    """Lay a small model beside one for the block: the same graph, and the weights in their place.

    Args:
        path: A model; one whose weights are in another file already is its own twin.

    Raises:
        PublishError: If the file is not what a model should be.
        OSError: If the disk does not take it.
    """
    if path.with_name(f"{path.name}.data").exists():
        yield path
        return
    twin = path.with_name(f"{path.name}.twin")
    try:
        twin.write_bytes(mapped_twin(path))
        yield twin
    finally:
        twin.unlink(missing_ok=True)


def mapped_twin(path: Path) -> bytes:
    """Return a small model that is the one in a file, with its weights left where they are.

    The twin refers to the places of the weights in the file itself as external data, so that a
    session made from it maps them and copies nothing. It is made by reading the file's bytes alone.

    Args:
        path: A model with its weights inside; the twin must lie beside it.

    Raises:
        PublishError: If the file is not what a model should be.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        parts: list[bytes] = []
        for number, start, begin, end in _fields(raw, 0, len(raw)):
            if number == _GRAPH:
                graph = b"".join(_graph_parts(raw, begin, end, path.name))
                parts.append(_tag(_GRAPH) + _varint(len(graph)) + graph)
            else:
                parts.append(raw[start:end])
        return b"".join(parts)


def _graph_parts(raw: mmap.mmap, begin: int, end: int, location: str) -> Iterator[bytes]:
    for number, start, inner, stop in _fields(raw, begin, end):
        if number != _INITIALIZER or stop - inner < SMALL_BYTES:
            yield raw[start:stop]
            continue
        tensor = onnx.TensorProto()
        place: tuple[int, int] | None = None
        for field, first, content, last in _fields(raw, inner, stop):
            if field == _RAW_DATA:
                place = (content, last - content)
            else:
                tensor.MergeFromString(raw[first:last])
        if place is not None:
            _make_external(tensor, location, *place)
        body = tensor.SerializeToString()
        yield _tag(_INITIALIZER) + _varint(len(body)) + body


def _fields(raw: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, start, start of the content, end) of each field of a message.

    Raises:
        PublishError: If a field ends behind its message.
    """
    fixed = {1: 8, 5: 4}
    while place < end:
        start = place
        tag, place = _read_varint(raw, place, end)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            size, place = _read_varint(raw, place, end)
        elif kind == 0:
            _, after = _read_varint(raw, place, end)
            size = after - place
        else:
            size = fixed.get(kind, end)
        if place + size > end:
            raise PublishError("The model's file is damaged: a field ends behind its message.")
        yield tag >> 3, start, place, place + size
        place += size


def _read_varint(raw: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end:
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:  # noqa: PLR2004 - the highest bit says that more follows
            return value, place
    raise PublishError("The model's file is damaged: it ends in the middle of a number.")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits per byte
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED)


def _proto(slot: Slot) -> onnx.TensorProto:
    return onnx.TensorProto(name=slot.name, data_type=slot.elem_type, dims=slot.dims)


def _opening(slot: Slot) -> bytes:
    """Return everything of an initializer that comes before its bytes."""
    inner = _proto(slot).SerializeToString() + _tag(_RAW_DATA) + _varint(slot.nbytes)
    return bytes(_tag(_INITIALIZER) + _varint(len(inner) + slot.nbytes) + inner)


def _make_external(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _checked(slot: Slot, tensor: torch.Tensor) -> memoryview:
    raw = raw_bytes(tensor)
    if raw.nbytes != slot.nbytes or tuple(tensor.shape) != slot.dims:
        raise PublishError(
            f"{slot.name!r} should be {slot.dims} and is {tuple(tensor.shape)}: nothing is written."
        )
    return raw
