"""A module without its weights, as bytes that another process makes a module of.

Everything that is no weight goes by value: attributes, tables, and classes and functions that are
defined where the other process does not find them: in the script or notebook itself, or in a file
that was loaded by hand. Weights are left out
by name and put in there, straight from where the checkpoint's tensors lie.
"""

from __future__ import annotations

import io
import pickle
import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import nn
from typing_extensions import override

from onnxport._torch_compat import plain_name
from onnxport.exporter.importable import by_value, is_importable
from onnxport.exporter.module_state import copy_module, load_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NotPicklableError", "make_skeleton", "pickle_by_value", "unpickle", "with_weights"]


class NotPicklableError(Exception):
    """Raised where a module holds something that cannot be sent to another process."""


def make_skeleton(
    module: nn.Module, state: Mapping[str, Any], *, without: tuple[Any, ...] = ()
) -> bytes:
    """Return a module without the weights that a ``state_dict`` holds.

    Args:
        module: A live module; it is not changed.
        state: The ``state_dict`` whose tensors will be put in.
        without: Hooks that the copy does not have.

    Raises:
        NotPicklableError: With the reason.
    """
    given = {plain_name(name) for name, value in state.items() if isinstance(value, torch.Tensor)}
    names: dict[int, str] = {}
    stand_ins: dict[int, Any] = {}
    for name, tensor in _persistent(module):
        if plain_name(name) in given and id(tensor) not in stand_ins:
            stand_ins[id(tensor)] = _stand_in(tensor)
            kind = "parameter" if isinstance(tensor, nn.Parameter) else ""
            names[id(stand_ins[id(tensor)])] = f"{plain_name(name)}|{kind}"
    copy = copy_module(module, stand_ins, without=without)
    return pickle_by_value(copy, names)


def _persistent(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return parameters and buffers of plain types, tied ones under each of their names."""
    return [
        (name, tensor)
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        if type(tensor) in {nn.Parameter, torch.Tensor}
    ]


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves weights out, and brings other tensors to the CPU."""

    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = names
        self._importable: dict[str, bool] = {}

    @override
    def persistent_id(self, obj: Any) -> str | None:
        return self._names.get(id(obj)) if isinstance(obj, torch.Tensor) else None

    @override
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.device.type not in {"cpu", "meta"}:
            return (
                obj.detach()
                .cpu()
                .__reduce_ex__(  # type: ignore[no-untyped-call]
                    pickle.HIGHEST_PROTOCOL
                )
            )
        if isinstance(obj, type | FunctionType | ModuleType):
            home = obj.__name__ if isinstance(obj, ModuleType) else obj.__module__
            if not self._knows(home):
                with by_value(sys.modules[home]):
                    return super().reducer_override(obj)
        return super().reducer_override(obj)

    def _knows(self, name: str) -> bool:
        """Tell whether the other process finds a module; asked once."""
        if name not in self._importable:
            self._importable[name] = is_importable(name)
        return self._importable[name]


class _Unpickler(pickle.Unpickler):  # noqa: S301 - only what our own process has pickled
    """Puts the checkpoint's tensors in, each of them once."""

    def __init__(self, file: io.BytesIO, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__(file)
        self._state = state
        self._made: dict[str, torch.Tensor] = {}

    @override
    def persistent_load(self, pid: str) -> torch.Tensor:
        if pid not in self._made:
            name, _, kind = pid.rpartition("|")
            tensor = self._state[name].detach()
            self._made[pid] = nn.Parameter(tensor, requires_grad=False) if kind else tensor
        return self._made[pid]


def pickle_by_value(value: Any, names: Mapping[int, str] | None = None) -> bytes:
    """Pickle anything, classes and functions of the script itself included.

    Args:
        value: What to pickle.
        names: ``id`` of tensors that are left out -> names under which they are found.

    Raises:
        NotPicklableError: With the reason.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, names or {}).dump(value)
    except Exception as error:  # user code runs in here: __getstate__, __reduce__
        raise NotPicklableError(
            f"{type(value).__name__} cannot be sent to another process: "
            f"{type(error).__name__}: {error}"
        ) from error
    return file.getvalue()


def unpickle(data: bytes, state: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Make a value again, with the tensors that were left out."""
    return _Unpickler(io.BytesIO(data), state or {}).load()


def with_weights(
    skeleton: bytes, state: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Make the module, on the CPU, with a checkpoint's weights; none is copied where none need be.

    Returns:
        The module, and warnings as of :func:`~onnxport.exporter.module_state.load_weights`.

    Raises:
        ValueError: If a tensor of the checkpoint has no place in the module.
    """
    plain = {plain_name(name): tensor for name, tensor in state.items()}
    with torch.inference_mode(False), torch.no_grad():
        module: nn.Module = unpickle(skeleton, plain)
        module.requires_grad_(False).cpu()
    return module, load_weights(module, state)
