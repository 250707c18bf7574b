"""torch's dtypes and ONNX's element types, and raw bytes of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["elem_type_of", "item_bytes", "raw_bytes", "same_bytes", "torch_dtype"]

_TYPES = onnx.TensorProto
_DTYPES: dict[int, torch.dtype] = {
    _TYPES.FLOAT: torch.float32,
    _TYPES.DOUBLE: torch.float64,
    _TYPES.FLOAT16: torch.float16,
    _TYPES.BFLOAT16: torch.bfloat16,
    _TYPES.INT8: torch.int8,
    _TYPES.INT16: torch.int16,
    _TYPES.INT32: torch.int32,
    _TYPES.INT64: torch.int64,
    _TYPES.UINT8: torch.uint8,
    _TYPES.UINT16: torch.uint16,
    _TYPES.UINT32: torch.uint32,
    _TYPES.UINT64: torch.uint64,
    _TYPES.BOOL: torch.bool,
    _TYPES.COMPLEX64: torch.complex64,
    _TYPES.COMPLEX128: torch.complex128,
}
_ELEM_TYPES = {dtype: elem_type for elem_type, dtype in _DTYPES.items()}


def torch_dtype(elem_type: int) -> torch.dtype:
    """Return torch's dtype for an ONNX element type.

    Raises:
        KeyError: If torch has none.
    """
    return _DTYPES[elem_type]


def elem_type_of(dtype: torch.dtype) -> int:
    """Return the ONNX element type of a torch dtype.

    Raises:
        KeyError: If ONNX has none.
    """
    return _ELEM_TYPES[dtype]


def item_bytes(elem_type: int) -> int:
    """Return the size of one element in bytes."""
    return torch_dtype(elem_type).itemsize


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as ONNX stores them; nothing is copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def same_bytes(tensor: torch.Tensor, other: ir.TensorProtocol) -> bool:
    """Tell whether a contiguous CPU tensor and one of a graph hold the same; NaN is NaN here.

    Neither is copied, for they may be large.
    """
    ours = np.frombuffer(raw_bytes(tensor), np.uint8)
    theirs = np.ascontiguousarray(other.numpy()).reshape(-1).view(np.uint8)
    kind = np.uint8 if len(ours) % 8 else np.uint64  # fewer things to compare
    return np.array_equal(ours.view(kind), theirs.view(kind))
