"""Keep a few of a module's calls: small, on the CPU, and as different as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from onnxport.tree import Example, constants, flatten, map_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Recorder", "address", "small_copy"]

MAX_CALLS = 8
"""Calls kept per module."""
MAX_ALIKE = 3
"""Calls kept that differ in values alone: other values may take another branch."""
MAX_BYTES = 8 * 2**20
"""Calls larger than this are cut to fewer rows where all their tensors have the same rows."""
HUGE_BYTES = 64 * 2**20
"""Calls larger than this are cut also where some of their tensors have other rows."""
MIN_ROWS = 16
"""What a cut leaves at least."""

_Key = tuple[Any, ...]


class Recorder:
    """Keeps a few calls of one module on the CPU: of each shape, and some with other values.

    Attributes:
        examples: The calls kept so far.
        touched_batch: Whether the first call got a tensor of the batch itself.
    """

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.touched_batch = False
        self._seen: dict[_Key, int] = {}
        self._cuts: dict[_Key, int] = {}

    @property
    def full(self) -> bool:
        """Whether enough was seen."""
        return len(self.examples) >= MAX_CALLS

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: set[int]) -> None:
        """Keep a call if its shapes are new, or if few calls of these shapes were kept.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            batch: Addresses of the storages of the batch's tensors.
        """
        if self.full:
            return
        spec, found = flatten((args, kwargs))
        key = _signature(spec, found)
        if not found or self._seen.get(key, 0) >= self._most_alike(found):
            return
        if not self.examples:
            self.touched_batch = any(address(tensor) in batch for _, tensor in found)
        rows = self._rows(key, [tensor for _, tensor in found])
        # Tensors made under inference mode cannot be exported; a clone made outside of it can.
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = map_tensors(
                (args, kwargs), lambda tensor: _copy(tensor, rows), fresh=True
            )
        self._seen[key] = self._seen.get(key, 0) + 1
        self.examples.append(Example(args, kwargs))

    def _most_alike(self, found: Sequence[tuple[Any, torch.Tensor]]) -> int:
        large = sum(_size_bytes(tensor) for _, tensor in found) > HUGE_BYTES
        # The last places are for other shapes, which say more than other values.
        return 1 if large or len(self.examples) >= MAX_CALLS - MAX_ALIKE else MAX_ALIKE

    def _rows(self, key: _Key, tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
        """Cut each shape to a size of its own: that sizes vary must still be seen."""
        rows = _rows_to_keep(tensors)
        if rows is None:
            return None
        common, kept = rows
        earlier = {size for other, size in self._cuts.items() if other != key}
        free = [size for size in range(kept, MIN_ROWS - 1, -1) if size not in earlier]
        self._cuts.setdefault(key, free[0] if free else kept)
        return common, self._cuts[key]


def _signature(spec: Any, found: Sequence[tuple[Any, torch.Tensor]]) -> _Key:
    """Return what two calls must differ in to be of different shape: flags are part of it."""
    flags = tuple(
        (path, value)
        for path, value in constants(spec).items()
        if value is None or isinstance(value, (bool, str))
    )
    return (*((path, tensor.shape, tensor.dtype) for path, tensor in found), flags)


def _rows_to_keep(tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Return (size of axis 0 to cut, rows to keep) when a call is too large to keep whole."""
    size_bytes = sum(map(_size_bytes, tensors))
    if size_bytes <= MAX_BYTES:
        return None
    sizes = [tensor.shape[0] for tensor in tensors if _has_rows(tensor)]
    common = max(set(sizes), key=sizes.count)
    if len(set(sizes)) > 1 and size_bytes <= HUGE_BYTES:
        return None  # a graph's edges count its nodes: rows of one must fit rows of the other
    # Room above the least, so that calls of several sizes can be cut to several sizes.
    kept = max(MIN_ROWS + MAX_CALLS, common * MAX_BYTES // size_bytes)
    return (common, kept) if common > kept else None


def _copy(tensor: torch.Tensor, rows: tuple[int, int] | None) -> torch.Tensor:
    tensor = tensor.detach()
    if rows is not None and _has_rows(tensor) and tensor.shape[0] == rows[0]:
        tensor = tensor[: rows[1]]
    tensor = tensor.to("cpu", copy=True)
    return tensor.contiguous() if tensor.layout is torch.strided else tensor


def _has_rows(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 0 and tensor.layout is torch.strided


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else 0


def small_copy(tree: Any) -> Any:
    """Copy the tensors of a batch to the CPU, of a large one only its first rows."""
    rows = _rows_to_keep([tensor for _, tensor in flatten(tree)[1]])
    with torch.inference_mode(False), torch.no_grad():
        return map_tensors(tree, lambda tensor: _copy(tensor, rows), fresh=True)


def address(tensor: torch.Tensor) -> int:
    """Return where a tensor's data lie; views of one tensor have one address."""
    if tensor.layout is not torch.strided:  # sparse tensors have no single storage
        return id(tensor)
    return tensor.untyped_storage().data_ptr()
