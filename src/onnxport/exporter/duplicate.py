"""Copies of values that ``copy.deepcopy`` refuses: as deep as each part allows."""

from __future__ import annotations

import copy
import io
import types
from collections import ChainMap, OrderedDict, deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import nn

__all__ = ["Duplicator", "NotCopiedError", "Unusable"]

_ATOMIC = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    type(None),
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)
_CONTAINERS = (list, set, OrderedDict)
_OF_PROCESSES = ("torch.distributed", "torch._C._distributed")


class NotCopiedError(RuntimeError):
    """Raised where an export would use what belongs to the training run alone."""


class Unusable:
    """Stands for something that cannot be copied; using it is an error.

    Args:
        kind: Name of the type that it stands for.
    """

    def __init__(self, kind: str) -> None:
        object.__setattr__(self, "_kind", kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these
            raise AttributeError(name)
        raise NotCopiedError(
            f"forward uses a {self._kind}, which belongs to the training run and cannot be copied."
        )

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.value


class Duplicator:
    """Copies values that belong together, so that what was one object stays one object.

    A value is copied with ``deepcopy``. If some part of it refuses (a lock, a socket, a tensor with
    a history), the parts are copied one by one and only those that refuse are shared. Iterators
    that refuse are replaced by an object that raises when it is used.

    Args:
        memo: What is already copied, by the ``id`` of the original; it is added to.
    """

    def __init__(self, memo: dict[Any, Any]) -> None:
        self.memo = memo

    def copy(self, value: Any) -> Any:
        """Return a copy that shares no state with the value, as far as there is one."""
        if isinstance(value, _ATOMIC):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if _binds_processes(value):
            return self._remember(value, Unusable(type(value).__name__))
        quick = self._quickly(value)
        if quick is not None:
            return quick
        # A copy that fails half-way leaves half copies behind; these must not be found later.
        trial: dict[Any, Any] = {}
        try:
            result = copy.deepcopy(value, ChainMap(trial, self.memo))  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - __deepcopy__ and __getstate__ are user code
            return self._piecewise(value)
        self.memo.update(trial)
        return result

    def _quickly(self, value: Any) -> Any:
        """Copy what most attributes of modules are: ``deepcopy`` takes five times as long."""
        kind = type(value)
        if kind is dict:
            twin = self._remember(value, {})
            twin.update({self.copy(key): self.copy(part) for key, part in value.items()})
            return twin
        if kind in _CONTAINERS and not value and not getattr(value, "__dict__", None):
            return self._remember(value, kind())
        if kind is tuple and all(type(part) in _ATOMIC for part in value):
            return value
        return None

    def _piecewise(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._remember(value, value.detach().clone())
        if isinstance(value, torch.Generator):
            twin = torch.Generator(value.device)
            return self._remember(value, twin.set_state(value.get_state()))
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            return self._remember(value, Unusable(type(value).__name__))
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, tuple):
            parts = [self.copy(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return self._object(value)

    def _remember(self, value: Any, twin: Any) -> Any:
        self.memo[id(value)] = twin
        return twin

    def _module(self, module: nn.Module) -> nn.Module:
        twin = object.__new__(type(module))
        self.memo[id(module)] = twin
        for name, value in vars(module).items():
            if name != "_compiled_call_impl":  # a closure over the original
                vars(twin)[name] = self.copy(value)
        return twin

    def _object(self, value: Any) -> Any:
        if hasattr(type(value), "__del__"):  # the end of a copy would close what it shares
            return self._remember(value, value)
        try:
            twin = copy.copy(value)
        except Exception:  # noqa: BLE001 - a lock, a socket, a handle: nothing to copy
            return self._remember(value, value)
        self.memo[id(value)] = twin
        if twin is value:
            return twin
        for name, part in vars(value).items() if hasattr(value, "__dict__") else ():
            vars(twin)[name] = self.copy(part)
        for name in _slots(type(value)):
            if hasattr(value, name):
                object.__setattr__(twin, name, self.copy(getattr(value, name)))
        self._fill(twin, value)
        return twin

    def _fill(self, twin: Any, value: Any) -> None:
        if isinstance(value, (MutableSequence, deque)):
            parts = [self.copy(part) for part in value]
            twin.clear()
            twin.extend(parts)
        elif isinstance(value, MutableMapping):
            items = [(self.copy(key), self.copy(part)) for key, part in value.items()]
            twin.clear()
            twin.update(items)
        elif isinstance(value, MutableSet):
            members = [self.copy(part) for part in value]
            twin.clear()
            for part in members:
                twin.add(part)


def _binds_processes(value: Any) -> bool:
    """Tell groups and meshes of processes, and what belongs to them.

    One process that used one would wait for the others for ever; and a copy of a group made by
    ``copy.copy`` ends Python when it is looked at (torch 2.13).
    """
    of_them = str(type(value).__module__).startswith(_OF_PROCESSES)
    return of_them and not isinstance(value, torch.Tensor | nn.Module)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in {"__dict__", "__weakref__"}:
                yield f"_{base.__name__.lstrip('_')}{name}" if _is_private(name) else name


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")
