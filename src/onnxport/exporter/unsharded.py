"""Weights that are spread over processes: gather them, and make an ordinary module around them.

FSDP2's ``fully_shard``, tensor parallelism, PyTorch's sharded state dicts and stage 3 of DeepSpeed
keep a part of each tensor in each process. Running such a module takes all processes; a copy with
whole tensors does not.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport.errors import ExportError
from onnxport.exporter.duplicate import Duplicator, Unusable
from onnxport.exporter.hooks import drop_hooks, hooks_of_any_kind
from onnxport.exporter.module_state import TRAINERS, plain_name, preserved_rng
from onnxport.exporter.shared_weights import SharedWeights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["gathered", "is_spread", "whole_module"]

logger = logging.getLogger(__name__)

_OF_TORCH = "torch.distributed"
_SPREADERS = (_OF_TORCH, "deepspeed")
"""Packages whose hooks, objects and classes are there to spread weights."""


def is_spread(state: Mapping[str, Any]) -> bool:
    """Tell whether a ``state_dict`` holds tensors of which this process has a part only."""
    return any(_is_part(tensor) for tensor in state.values())


def gathered(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Return a ``state_dict`` with whole tensors on the CPU.

    All processes must call it with the same names. One tensor after the other is put together, so
    that a process never holds more than one whole tensor, but for the one that keeps them.

    Args:
        state: The part of this process.
        keep: Whether this process is the one that wants them; others get an empty mapping.

    Raises:
        ExportError: If there is no room to keep them; all processes have done their part then.
    """
    whole: dict[str, Any] = {}
    failure: Exception | None = None
    if keep:
        try:
            whole = _room_for(state)
        except Exception as error:  # noqa: BLE001 - the others wait for this process
            failure = error
    with torch.no_grad(), torch.inference_mode(False):
        for name, value in state.items():
            with _together(value) as tensor:
                if not keep or failure is not None:
                    continue
                try:
                    _keep(whole, name, tensor)
                except Exception as error:  # noqa: BLE001 - as above
                    failure = error
                    whole.clear()
    if failure is not None:
        raise ExportError(f"The whole weights could not be kept: {failure}") from failure
    return whole


def _keep(whole: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        whole[name].copy_(value.detach())
    else:
        whole[name] = value


def _room_for(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return whole tensors without values, where another process can map them if possible."""
    shapes = {
        name: (getattr(value, "ds_shape", value.shape), value.dtype)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    try:
        return SharedWeights(shapes)
    except Exception:  # no such files, no room, or tensors of a kind that has no data
        logger.debug("Whole weights are kept where no other process sees them.", exc_info=True)
        return {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in shapes.items()}


def whole_module(module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Return an ordinary module with whole tensors; no other process is asked.

    It shares the tensors of the ``state_dict``, and everything else is copied. Wrappers and hooks
    that PyTorch put there to spread the weights are left out.

    Args:
        module: The live module.
        state: Whole tensors, on the CPU.

    Raises:
        ExportError: If a tensor that is spread has no whole one in the ``state_dict``.
    """
    plain = {plain_name(name): tensor for name, tensor in state.items()}
    memo: dict[Any, Any] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        memo.setdefault(id(tensor), _stand_in(plain_name(name), tensor, plain))
    machinery = [hook for hook in hooks_of_any_kind(module) if _is_machinery(hook)]
    memo |= {id(hook): Unusable("hook") for hook in machinery}
    memo |= {id(value): None for value in _not_its_own(module)}
    with preserved_rng(), torch.no_grad(), torch.inference_mode(False):
        twin: nn.Module = Duplicator(memo).copy(module)
    drop_hooks(twin, [hook for hook in hooks_of_any_kind(twin) if isinstance(hook, Unusable)])
    for submodule in twin.modules():
        submodule.__class__ = _own_class(type(submodule))
        # DeepSpeed's own kind of dict asks all processes for a parameter.
        submodule._parameters = dict(submodule._parameters)  # noqa: SLF001 - has no public name
    return twin


def _not_its_own(module: nn.Module) -> Iterator[Any]:
    """Yield what a module's parts hold of the training and of the machinery that spreads them."""
    for submodule in module.modules():
        for name, value in vars(submodule).items():
            machinery = type(value).__module__.startswith("deepspeed") and name != "_parameters"
            if value is not None and (name in TRAINERS or machinery):
                yield value


def _is_part(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and (
        hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")
    )


@contextmanager
def _together(value: Any) -> Iterator[Any]:
    """Give a whole tensor for a part of one; all processes must come here. Others stay."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            yield value
    elif _is_part(value):
        # A part that was brought to the CPU must go back to where its processes speak.
        yield value.to(value.device_mesh.device_type).full_tensor()
    else:
        yield value


def _stand_in(name: str, tensor: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    """Return the whole tensor that takes a tensor's place.

    Raises:
        ExportError: If there is none.
    """
    given = state.get(name)
    if given is None and _is_part(tensor):
        raise ExportError(
            f"The checkpoint does not hold {name!r}, whose values are spread over processes."
        )
    data = tensor.detach().to("cpu", copy=True) if given is None else given.detach().cpu()
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data


def _is_machinery(hook: Any) -> bool:
    """Tell whether PyTorch has put a hook there to spread weights or inputs."""
    hook = getattr(hook, "hook", hook)  # of a wrapper that knows the module
    owner = getattr(hook, "__self__", None)
    function = getattr(hook, "func", hook)  # of a partial
    homes = (type(owner).__module__, getattr(function, "__module__", None))
    return any(str(home).startswith(_SPREADERS) for home in homes)


def _own_class(kind: type) -> type:
    """Return the class of a module before ``fully_shard`` has put one of its own before it."""
    while len(kind.__bases__) > 1 and kind.__bases__[0].__module__.startswith(_OF_TORCH):
        kind = kind.__bases__[-1]
    return kind
