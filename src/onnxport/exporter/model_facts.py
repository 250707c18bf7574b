"""What an ONNX file is: interface, operators, weights and where they came from; nothing is run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from onnxport.exporter.confined import require_confined
from onnxport.exporter.model_file import mapped_twin
from onnxport.exporter.ownership import read_metadata
from onnxport.signature import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["ModelFacts", "facts_of", "read_model", "weights_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a file says of itself.

    Args:
        path: The model.
        bytes: Its size, external data included.
        external: Names of the files that hold weights besides.
        opset: Version of each operator set by domain; ``""`` is ONNX's own.
        producer: What has written it.
        inputs: Name, dtype and shape of each input.
        outputs: Name, dtype and shape of each output.
        operators: How many nodes there are of each operator, inner graphs included.
        parameters: Number of elements of all weights.
        weights: Bytes of weights by dtype.
        origin: What onnxport has written about it (checkpoint, hash of the weights, metrics, error
            budget, ...), or nothing: another tool has made it.
    """

    path: str
    bytes: int
    external: tuple[str, ...] = ()
    opset: dict[str, int] = field(default_factory=dict)
    producer: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    operators: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_model(path: Path) -> onnx.ModelProto:
    """Return a model whose weights are left in its files.

    Raises:
        UnsafeFileError: If it is no model, or would have files read that are not below its folder.
        OSError: If it cannot be read.
    """
    require_confined(path)
    model: onnx.ModelProto = onnx.ModelProto.FromString(mapped_twin(path))
    return model


def facts_of(path: Path) -> ModelFacts:
    """Look at a model of any tool.

    Args:
        path: The file.

    Raises:
        UnsafeFileError: If it is no model, or would have files read that are not below its folder.
        OSError: If it cannot be read.
    """
    model = read_model(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    bytes_of: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        bytes_of[_dtype(tensor.data_type)] += _nbytes(tensor)
    external = sorted(_external_files(model) - {path.name})
    return ModelFacts(
        path=str(path),
        bytes=sum(file.stat().st_size for file in (path, *(path.parent / n for n in external))),
        external=tuple(external),
        opset={each.domain: each.version for each in model.opset_import},
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=tuple(_spec(each) for each in model.graph.input if each.name not in weights),
        outputs=tuple(_spec(each) for each in model.graph.output),
        operators=dict(Counter(_operators(model)).most_common()),
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        weights=dict(bytes_of.most_common()),
        origin=read_metadata(path),
    )


def weights_of(path: Path, model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the weights of a model, mapped from its files.

    Args:
        path: The model.
        model: What :func:`read_model` returned of it.
    """
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            yield tensor.name, onnx.numpy_helper.to_array(tensor)
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        shape = tuple(tensor.dims)
        dtype = tensor_dtype_to_np_dtype(tensor.data_type)
        if not math.prod(shape):
            yield tensor.name, np.empty(shape, dtype)
            continue
        file, whole = path.parent / place["location"], _nbytes(tensor)
        length = int(place.get("length") or whole)
        raw = np.memmap(file, np.uint8, "r", int(place.get("offset") or 0), (length,))
        if length == whole:
            yield tensor.name, raw.view(dtype).reshape(shape)
        else:  # two elements of four bits share a byte
            packed = onnx.TensorProto(dims=shape, data_type=tensor.data_type, raw_data=bytes(raw))
            yield tensor.name, onnx.numpy_helper.to_array(packed)


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Return how many bytes a tensor has as an array; four-bit types have one for each element."""
    dtype: np.dtype[Any] = tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * dtype.itemsize)


def _operators(model: onnx.ModelProto) -> Iterator[str]:
    graphs = [model.graph, *(onnx.GraphProto(node=each.node) for each in model.functions)]
    while graphs:
        for node in graphs.pop().node:
            yield f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for attribute in node.attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or f"?{axis}"
        for axis, size in enumerate(kind.shape.dim)
    )
    return TensorSpec(name=value.name, dtype=_dtype(kind.elem_type), shape=shape)


def _dtype(number: int) -> str:
    try:
        return str(tensor_dtype_to_np_dtype(number))
    except (KeyError, TypeError):  # a sequence, or a type of a later version
        return "unknown"
