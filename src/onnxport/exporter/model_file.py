"""Write a model tensor by tensor, and find the tensors in one again without loading it.

A protobuf message is its fields, one after the other, each with a tag and a length; that is enough
to write the weights straight to where they belong, and to read where they lie. Nothing here holds
more than one tensor.

Source: protobuf's encoding (protobuf.dev/programming-guides/encoding), ``onnx.proto3``.
"""

from __future__ import annotations

import mmap
from contextlib import closing, contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from onnxport.errors import PublishError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from io import RawIOBase
    from pathlib import Path

    import torch

    from onnxport.exporter.template import Slot

__all__ = [
    "mapped_twin",
    "mapped_weights",
    "twin_of",
    "with_weights_as_inputs",
    "write_all",
    "write_external",
    "write_inline",
]

_GRAPH, _INITIALIZER, _INPUT, _RAW_DATA, _METADATA = 7, 5, 11, 9, 14
"""Field numbers of ``ModelProto.graph``, ``GraphProto.initializer``, ``GraphProto.input``,
``TensorProto.raw_data``, ``ModelProto.metadata_props``."""

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
    write_all(file, _beginning(head, graph, slots))
    for opening, slot, tensor in zip(openings, slots, tensors, strict=True):
        write_all(file, opening)
        write_all(file, _checked(slot, tensor))


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
    write_all(file, _beginning(head, graph, slots, location))
    for slot, tensor in zip(slots, tensors, strict=True):
        write_all(data, b"\0" * (-data.tell() % _ALIGNMENT))
        write_all(data, _checked(slot, tensor))


def write_all(file: RawIOBase, content: bytes | memoryview) -> None:
    """Write all of it: past 2 GB one call of the system takes only a part."""
    rest = memoryview(content)
    while rest.nbytes:
        rest = rest[file.write(rest) or 0 :]


def _beginning(
    head: bytes, graph: bytes, slots: Sequence[Slot], location: str | None = None
) -> bytes:
    """Return what a model begins with: all but the weights, if these are in it, and what follows.

    Args:
        head: See :func:`write_inline`.
        graph: See :func:`write_inline`.
        slots: See :func:`write_inline`.
        location: Name of the file with the weights, if they are in another one.
    """
    if location is None:
        rest, size = b"", sum(len(_opening(slot)) + slot.nbytes for slot in slots)
    else:
        initializers = []
        for slot, offset in zip(slots, _offsets(slots), strict=True):
            proto = _proto(slot)
            _make_external(proto, location, offset, slot.nbytes)
            raw = proto.SerializeToString()
            initializers.append(_tag(_INITIALIZER) + _varint(len(raw)) + raw)
        rest = b"".join(initializers)
        size = len(rest)
    return head + _tag(_GRAPH) + _varint(len(graph) + size) + graph + rest


def _offsets(slots: Sequence[Slot]) -> Iterator[int]:
    """Yield where each tensor begins in a file of its own."""
    offset = 0
    for slot in slots:
        offset += -offset % _ALIGNMENT
        yield offset
        offset += slot.nbytes


def with_weights_as_inputs(head: bytes, graph: bytes, slots: Sequence[Slot]) -> bytes:
    """Return a model that takes its weights as further inputs, so that it can be loaded once.

    Args:
        head: See :func:`write_inline`.
        graph: See :func:`write_inline`.
        slots: See :func:`write_inline`.
    """
    infos = []
    for slot in slots:
        info = onnx.helper.make_tensor_value_info(slot.name, slot.elem_type, slot.dims)
        raw = info.SerializeToString()
        infos.append(_tag(_INPUT) + _varint(len(raw)) + raw)
    body = graph + b"".join(infos)
    return head + _tag(_GRAPH) + _varint(len(body)) + body


def mapped_weights(
    path: Path, head: bytes, graph: bytes, slots: Sequence[Slot]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights of a model that was written of these parts, where they lie in its file.

    The file is mapped; nothing is copied. That it has these parts and no others is checked.

    Args:
        path: The model.
        head: See :func:`write_inline`.
        graph: See :func:`write_inline`.
        slots: See :func:`write_inline`.

    Raises:
        PublishError: If the file is another one.
        OSError: If it cannot be read.
    """
    data = path.with_name(f"{path.name}.data")
    external = data.exists()
    beginning = _beginning(head, graph, slots, data.name if external else None)
    model, end = _mapped(path), len(beginning)
    same = model[:end] == beginning
    if external:
        raw, places = _mapped(data) if slots else model, list(_offsets(slots))
    else:
        raw, places = model, []
        for slot in slots:
            opening = _opening(slot)
            same = same and model[end : end + len(opening)] == opening
            places.append(end + len(opening))
            end += len(opening) + slot.nbytes
    whole = all(p + s.nbytes <= len(raw) for p, s in zip(places, slots, strict=True))
    if not (same and whole and all(f[0] == _METADATA for f in _fields(model, end, len(model)))):
        raise PublishError(f"{path.name} is not the file that was written.")
    return {
        slot.name: np.frombuffer(
            raw, tensor_dtype_to_np_dtype(slot.elem_type), prod(slot.dims), place
        ).reshape(slot.dims)
        if slot.nbytes
        else np.empty(slot.dims, tensor_dtype_to_np_dtype(slot.elem_type))
        for slot, place in zip(slots, places, strict=True)
    }


def _mapped(path: Path) -> mmap.mmap:
    """Map a file.

    Raises:
        PublishError: If there is nothing in it.
    """
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise PublishError(f"{path.name} is empty.") from error


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
    with closing(_mapped(path)) as raw:
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
    # Here, because who only reads models does without torch, which takes seconds to import.
    from onnxport.exporter.tensors import raw_bytes

    # Before the bytes are asked for: a tensor of any size may be a view of a single number.
    same = tuple(tensor.shape) == slot.dims
    if not same or (raw := raw_bytes(tensor)).nbytes != slot.nbytes:
        raise PublishError(
            f"{slot.name!r} should be {slot.dims} and is {tuple(tensor.shape)}: nothing is written."
        )
    return raw
