"""Read the tensors of a checkpoint without reading the file and without trusting it.

The file is mapped: bytes come into memory when they are used. Nothing in it is executed: what is no
tensor (hyperparameters, a datamodule's state, objects of the user's own classes) becomes an object
that does nothing, so that no checkpoint has to be trusted and none is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import sys
import types
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from onnxport._archive import require_archive
from onnxport.errors import ExportError
from onnxport.exporter.safetensors_file import read_safetensors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "NOT_PLAIN",
    "is_checkpoint",
    "is_readable",
    "read_plain_content",
    "read_state_dict",
    "weights_in",
    "weights_in_folder",
]

_POPULATE_READ = 22
"""``MADV_POPULATE_READ``. Source: Linux, ``asm-generic/mman-common.h``."""

_DESCRIPTIONS = frozenset(
    {
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
                *("StorageMeta", "TensorProperties", "TensorStorageMetadata"),
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)
_METADATA = ".metadata"
"""What ``torch.distributed.checkpoint`` writes last into a folder."""
_OF_FSDP1 = "model"
"""Where Lightning has FSDP1's weights. Source: ``FSDPStrategy.save_checkpoint``, 2.6."""
_OF_DEEPSPEED = "latest"
"""What DeepSpeed writes last into a folder."""
_SAFE, _SAFE_INDEX = ".safetensors", ".safetensors.index.json"
_USUAL = ("model", "model_state_dict", "module", "network", "net", "weights")
"""Where loops of people's own have the weights."""
PRETRAINED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""What weights are called where each checkpoint has a folder of its own."""
MAX_DEPTH = 8
"""How deep plain values of a checkpoint are read."""
NOT_PLAIN = object()
"""Stands for what is no plain value."""
_REBUILDERS = frozenset(
    {"_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"}
)


def read_state_dict(path: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's ``state_dict``, mapped from its file.

    Writing to them changes neither the file nor what others read from it.

    Args:
        path: A file that ``torch.save`` or ``safetensors`` wrote, or the index of several of the
            latter; or a folder that ``torch.distributed.checkpoint`` wrote, whose tensors are put
            together, by this process alone.
        key: Where the ``state_dict`` lies in a file of ``torch.save``; ``""``: it is the whole
            content. If there is no such place, the one place that holds tensors by name is taken.

    Raises:
        ExportError: If the file holds no such thing or is damaged.
        FileNotFoundError: If it is not there.
    """
    try:
        if path.is_dir():
            return _read_folder(path, key)
        if path.name.endswith((_SAFE, _SAFE_INDEX)):
            return read_safetensors(path)
        require_archive(path)
        content = torch.load(  # nosec
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_inert_pickle
        )
        state = weights_in(content, key)
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ExportError(
            f"The weights in {path} cannot be read: {type(error).__name__}: {error}"
        ) from error
    for tensor in tensors.values():
        _populate(tensor)
    return tensors


def weights_in(content: Any, key: str = "state_dict") -> Any:
    """Find the weights in what a loop of somebody's own has saved.

    Args:
        content: What was saved.
        key: Where they should lie; ``""``: the content is nothing else.

    Raises:
        KeyError: If there are none, or it is not clear which are meant.
    """
    if not key:
        return content
    if key in content:
        return content[key]
    if _are_weights(content):
        return content
    places = [name for name, value in content.items() if _are_weights(value)]
    places = [name for name in _USUAL if name in places] or places
    if not places or (len(places) > 1 and places[0] not in _USUAL):
        raise KeyError(key)
    return content[places[0]]


def _are_weights(value: Any) -> bool:
    """Tell whether something is tensors by name, and nothing else."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(each, torch.Tensor) for each in value.values())
    )


def read_plain_content(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says in plain values: numbers, strings and containers of these.

    Tensors without dimensions become numbers; in place of other tensors, and of objects of any
    class, there is :data:`NOT_PLAIN`.

    Args:
        path: A file that ``torch.save`` wrote.

    Raises:
        ExportError: If it is no such file, or is damaged.
        FileNotFoundError: If it is not there.
    """
    try:
        require_archive(path)
        content = torch.load(  # nosec
            path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_inert_pickle
        )
        plain = _plain(content, MAX_DEPTH)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return plain if isinstance(plain, dict) else {}


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.dim() == 0 else NOT_PLAIN
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth and isinstance(value, dict):
        return {key: _plain(item, depth - 1) for key, item in value.items() if isinstance(key, str)}
    if depth and isinstance(value, list):
        return [_plain(item, depth - 1) for item in value]
    if depth and isinstance(value, tuple):
        return tuple(_plain(item, depth - 1) for item in value)
    return NOT_PLAIN


def weights_in_folder(folder: Path) -> Path:
    """Return the file of weights in the folder of a checkpoint; the folder itself if there is none.

    Args:
        folder: Anything; a file is returned as it is.
    """
    return next((folder / name for name in PRETRAINED if (folder / name).is_file()), folder)


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path is a file, or a folder that processes have written together."""
    return is_readable(path) or (path / _OF_DEEPSPEED).is_file()


def is_readable(path: Path) -> bool:
    """Tell whether a path is a checkpoint that :func:`read_state_dict` can read."""
    return path.is_file() or (path / _METADATA).is_file()


def _read_folder(path: Path, key: str) -> dict[str, torch.Tensor]:
    """Read what processes have written together.

    Raises:
        OSError: If a part cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if (path / _OF_DEEPSPEED).is_file():
        raise OSError(
            "DeepSpeed has written it. Make one file of it with the zero_to_fp32.py that lies in it"
        )
    reader = _folder_reader(path)
    metadata = reader.read_metadata()
    places = metadata.planner_data or {}
    paths = {
        name: places.get(name, tuple(name.split(".", 1))) for name in metadata.state_dict_metadata
    }
    if key and not any(first == key for first, *_ in paths.values()):
        key = _OF_FSDP1
    wanted: dict[str, torch.Tensor] = {}
    for name, found in metadata.state_dict_metadata.items():
        first, *rest = paths[name]
        if (not key or first == key) and isinstance(found, TensorStorageMetadata):
            inner = ".".join(map(str, rest)) if key else name
            wanted[inner] = torch.empty(found.size, dtype=found.properties.dtype)
    # The others of the group, if there is one, do not take part.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant
        try:
            load({key: wanted} if key else wanted, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # no Exception: it would end training
            reasons = [str(failure[0]) for failure in error.failures.values()]
            raise OSError("; ".join(reasons)) from error
    return wanted


def _folder_reader(path: Path) -> Any:
    """Return torch's reader of such a folder, which would execute what its description says."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        @override
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with (path / _METADATA).open("rb") as file:
                return _DescriptionUnpickler(file).load()

    return Reader(path)


def _populate(tensor: torch.Tensor) -> None:
    """Map all pages of a tensor in one call: one by one, as they are used, takes twice as long.

    Only a hint: a system that does not know it (Linux before 5.14, others) refuses, harmlessly.
    """
    if sys.platform != "linux" or not tensor.nbytes:
        return
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _POPULATE_READ)


class _Inert:
    """Stands for an object of any class: it takes everything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Inert()

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Take an item."""

    def extend(self, _: Any) -> None:
        """Take items."""

    def add(self, _: Any) -> None:
        """Take a member."""


_PLAIN = object()
"""Stands for the class ``torch.Tensor``, which could make tensors of any size."""


def _without_attributes(rebuild: Any, kind: Any, args: tuple[Any, ...], _: Any) -> Any:
    """Take the place of ``torch._tensor._rebuild_from_type_v2``: a tensor that has attributes."""
    return rebuild(*args) if kind is _PLAIN else _Inert()


class _InertUnpickler(pickle._Unpickler):  # noqa: SLF001 - see below
    """Finds torch's functions that make tensors; everything else is inert.

    The one in Python: that in C makes room for as many objects as a file says there are, up to
    32 GiB for a file of ten bytes.
    """

    @override
    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in _REBUILDERS:
            return getattr(torch._utils, name)  # noqa: SLF001 - what torch.save writes down
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _without_attributes
        if (module, name) == ("torch", "Tensor"):
            return _PLAIN
        if module in {"torch", "torch.storage"}:
            value = getattr(torch if module == "torch" else torch.storage, name, None)
            storage = isinstance(value, type) and name.endswith("Storage")
            if storage or isinstance(value, torch.dtype) or name in {"Size", "device"}:
                return value
        return _Inert


class _DescriptionUnpickler(_InertUnpickler):
    """Finds also what ``torch.distributed.checkpoint`` describes tensors with."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DESCRIPTIONS:
            return getattr(sys.modules[module], name)
        return super().find_class(module, name)


def _load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


_inert_pickle: Any = types.SimpleNamespace(
    Unpickler=_InertUnpickler, load=_load, __name__="onnxport's inert pickle"
)
