"""Models of anybody: which other files they would have read, before somebody reads them."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError

from onnxport.errors import PublishError, UnsafeFileError
from onnxport.exporter.model_file import mapped_twin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["require_confined", "tensors_in"]


def require_confined(path: Path) -> None:
    """Refuse a model whose weights would be read from anywhere but its own folder.

    The weights themselves are not read.

    Args:
        path: The model.

    Raises:
        UnsafeFileError: If it refers to a file by an absolute path, above its folder, through a
            link, or to bytes that are not there; or if it is no model.
        OSError: If it cannot be read.
    """
    try:
        model = onnx.ModelProto.FromString(mapped_twin(path))
    except (PublishError, DecodeError) as error:
        raise UnsafeFileError(f"{path} is no ONNX model, or a damaged one: {error}") from error
    nodes = (node for function in model.functions for node in function.node)
    within_functions = onnx.GraphProto(node=nodes)
    for tensor in tensors_in((model.graph, within_functions)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if len(place) != len(tensor.external_data):  # readers differ in which one they take
                why = "and names that place twice"
                raise UnsafeFileError(_refers(path, place.get("location", ""), why))
            _require_place(path, place)


def _require_place(model: Path, place: dict[str, str]) -> None:
    location = place.get("location", "")
    names = PurePosixPath(location)
    plain = not names.is_absolute() and not PureWindowsPath(location).anchor
    if not plain or not names.parts or ".." in names.parts or "\\" in location:
        raise UnsafeFileError(_refers(model, location, "which is not a path below its folder"))
    file = model.parent / names
    steps = [file, *file.parents[: len(names.parts) - 1]]
    # The model's own name may be a link: somebody has given that name.
    if location != model.name and any(step.is_symlink() for step in steps):
        raise UnsafeFileError(_refers(model, location, "which is a link, or lies behind one"))
    if not file.is_file():
        raise UnsafeFileError(_refers(model, location, "which is not there"))
    try:
        offset = int(place.get("offset") or 0)
        length = int(place.get("length") or 0)
    except ValueError:
        offset = -1
        length = 0
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise UnsafeFileError(_refers(model, location, "to bytes of it that are not there"))


def _refers(model: Path, location: str, why: str) -> str:
    return (
        f"{model} refers to {location!r}, {why}. Use the model as it was exported, with all its "
        "files in one folder; if somebody else has made it, do not load it at all."
    )


def tensors_in(graphs: Iterable[onnx.GraphProto]) -> Iterator[onnx.TensorProto]:
    """Yield all tensors of graphs, those in attributes and inner graphs included.

    It goes no deeper than protobuf lets a message be (100).
    """
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for attribute in (each for node in graph.node for each in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            yield from tensors_in((attribute.g, *attribute.graphs))
