"""What of a module is no weight and may yet be in the graph: numbers, flags, tables, functions.

An export keeps the values that Python attributes had. Whether any of them is another one now is
seen here, by a walk over the live module that copies nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport.exporter.hooks import HOOK_MARKS, is_observer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["changed_paths", "fingerprint"]

logger = logging.getLogger(__name__)

MAX_DEPTH = 6
"""How deep objects inside of objects are followed."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Path)

_NOT_STATE = frozenset(
    {
        *("training", "_parameters", "_modules", "_buffers", "_non_persistent_buffers_set"),
        *("_trainer", "_fabric", "_compiled_call_impl", "_compiler_ctx", "_is_full_backward_hook"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
        *("_load_state_dict_post_hooks", "_backward_hooks", "_backward_pre_hooks"),
        *HOOK_MARKS,
        # Lightning's notes of where the loop is.
        *("_current_fx_name", "_log_hyperparams", "_param_requires_grad_state", "_device"),
        *("_automatic_optimization", "_metric_attributes", "_jit_is_scripting"),
    }
)
"""What no forward pass in eval mode depends on, and what is looked at in another way."""


_SAVES_NOTE = frozenset({"architectures", "dtype", "transformers_version", "_name_or_path"})
"""What a save of a pretrained model writes into its configuration, which has the first of them."""


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Return a digest for each attribute of each submodule that is no weight.

    Args:
        module: A live module; it is read only.

    Returns:
        ``<submodule>.<attribute>`` -> digest. A value that cannot be read has a digest by its type.
    """
    return {path: _digest(value) for path, value in _values(module)}


def changed_paths(before: Mapping[str, str], now: Mapping[str, str]) -> frozenset[str]:
    """Return the attributes that are new, gone or other than they were."""
    return frozenset(
        path for path in before.keys() | now.keys() if before.get(path) != now.get(path)
    )


def _values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, submodule in module.named_modules():
        prefix = f"{name}." if name else ""
        attributes = vars(submodule)
        yield f"{prefix}(class)", type(submodule)
        yield f"{prefix}(children)", tuple(attributes["_modules"])
        for key, value in attributes.items():
            if (
                key in _NOT_STATE
                or value is None
                or (value == {} if type(value) is dict else False)
            ):
                continue
            yield f"{prefix}{key}", value
        for key in attributes["_non_persistent_buffers_set"]:
            yield f"{prefix}{key}", attributes["_buffers"].get(key)


def _digest(value: Any) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    try:
        _feed(hasher, value, 0, set())
    except Exception:
        logger.debug("A value of type %s cannot be read.", type(value), exc_info=True)
        hasher.update(type(value).__qualname__.encode())
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any, depth: int, seen: set[int]) -> None:
    kind = type(value)
    hasher.update(f"<{kind.__module__}.{kind.__qualname__}>".encode())
    if isinstance(value, _PLAIN):
        hasher.update(repr(value).encode())
        return
    if isinstance(value, torch.Tensor):
        _feed_tensor(hasher, value)
        return
    if isinstance(value, (type, ModuleType, BuiltinFunctionType)):
        hasher.update(f"{getattr(value, '__qualname__', value.__name__)}".encode())
        return
    if isinstance(value, nn.Module) or id(value) in seen or depth > MAX_DEPTH:
        return  # submodules have entries of their own
    seen.add(id(value))
    for part in _parts(value):
        _feed(hasher, part, depth + 1, seen)


def _parts(value: Any) -> list[Any]:  # noqa: PLR0911 - one line per kind of value
    """Return what a value is made of."""
    if isinstance(value, Mapping):
        return [
            part for key, item in value.items() if not is_observer(item) for part in (key, item)
        ]
    if isinstance(value, AbstractSet):
        return sorted(map(repr, value))
    if isinstance(value, Enum):
        return [value.name]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, str)):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [
            value.__qualname__,
            value.__code__,
            value.__defaults__,
            value.__kwdefaults__,
            *cells,
        ]
    if isinstance(value, CodeType):
        return [value.co_code, [const for const in value.co_consts if isinstance(const, _PLAIN)]]
    attributes = getattr(value, "__dict__", {})
    notes = _SAVES_NOTE if "architectures" in attributes else ()
    return [part for item in attributes.items() if item[0] not in notes for part in item]


def _feed_tensor(hasher: Any, tensor: torch.Tensor) -> None:
    hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if isinstance(tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return  # a weight by another name
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
