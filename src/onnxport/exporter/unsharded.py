"""Weights that are spread over processes: gather them, and make an ordinary module around them.

FSDP2's ``fully_shard``, FSDP1, tensor parallelism, PyTorch's sharded state dicts and stage 3 of
DeepSpeed keep a part of each tensor in each process. Running such a module takes all processes; a
copy with whole tensors does not.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport._torch_compat import gathered_shards, plain_name, unwrapped
from onnxport.errors import ExportError
from onnxport.exporter.duplicate import Duplicator, Unusable
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.hooks import drop_hooks, hooks_of_any_kind
from onnxport.exporter.module_state import TRAINERS
from onnxport.exporter.shared_weights import SharedWeights
from onnxport.tree import map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxport.tree import Example

__all__ = ["gathered", "is_flattened", "is_spread", "uncast", "whole_module"]

logger = logging.getLogger(__name__)

_OF_TORCH = "torch.distributed"
_SPREADERS = (_OF_TORCH, "deepspeed")
"""Packages whose hooks, objects and classes are there to spread weights."""


def is_spread(state: Mapping[str, Any]) -> bool:
    """Tell whether a ``state_dict`` holds tensors of which this process has a part only."""
    return any(_is_part(tensor) for tensor in state.values())


def is_flattened(module: nn.Module | None) -> bool:
    """Tell whether FSDP1 keeps parameters of a module in flat ones."""
    return module is not None and any(hasattr(one, _FLATTENED) for one in module.parameters())


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


def whole_module(module: nn.Module, state: Mapping[str, Any], *, flat: bool = False) -> nn.Module:
    """Return an ordinary module with whole tensors; no other process is asked.

    It shares the tensors of the ``state_dict``, and everything else is copied. Wrappers and hooks
    that PyTorch put there to spread the weights are left out.

    Args:
        module: The live module.
        state: Whole tensors, on the CPU.
        flat: Whether FSDP1 may have put flat parameters in the place of others.

    Raises:
        ExportError: If a tensor that is spread has no whole one in the ``state_dict``.
    """
    plain = {plain_name(name): tensor for name, tensor in state.items()}
    memo: dict[Any, Any] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not hasattr(tensor, _FLAT):
            memo.setdefault(id(tensor), _stand_in(plain_name(name), tensor, plain))
    machinery = [hook for hook in hooks_of_any_kind(module) if _is_machinery(hook)]
    memo |= {id(hook): Unusable("hook") for hook in machinery}
    memo |= {id(value): None for value in _not_its_own(module)}
    memo |= {id(view): None for view in (_views_of_flat(module, plain) if flat else ())}
    with preserved_globals(), torch.no_grad(), torch.inference_mode(False):
        twin: nn.Module = Duplicator(memo).copy(module)
    for submodule in list(twin.modules()):
        children = vars(submodule)["_modules"]
        if isinstance(children, dict):  # not of a script module
            children.update({name: unwrapped(child) for name, child in children.items()})
    twin = unwrapped(twin)
    if flat:
        _register_missing(twin, plain)
    drop_hooks(twin, [hook for hook in hooks_of_any_kind(twin) if isinstance(hook, Unusable)])
    for submodule in twin.modules():
        submodule.__class__ = _own_class(type(submodule))
        # DeepSpeed's own kind of dict asks all processes for a parameter.
        submodule._parameters = dict(submodule._parameters)  # noqa: SLF001 - has no public name
    return twin


def uncast(call: Example, module: nn.Module) -> Example:
    """Return a call as a whole module takes it.

    In mixed precision FSDP casts what a module is called with on its way in, and the weights for
    the time of the call. The weights of a whole module are what they are.

    Args:
        call: As it was seen inside.
        module: The whole module.
    """
    kinds = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    (kind, *others) = kinds or {torch.float32}

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < kind.itemsize
        return tensor.to(kind) if narrow and not others else tensor

    args, kwargs = map_tensors((call.args, dict(call.kwargs)), widened)
    return replace(call, args=args, kwargs=kwargs)


def _not_its_own(module: nn.Module) -> Iterator[Any]:
    """Yield what a module's parts hold of the training and of the machinery that spreads them."""
    for submodule in module.modules():
        for name, value in vars(submodule).items():
            machinery = type(value).__module__.startswith("deepspeed") and name != "_parameters"
            if value is not None and (name in TRAINERS or machinery):
                yield value


def _register_missing(twin: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module its tensors back where FSDP1 has put a flat one in their place."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        try:
            owner = twin.get_submodule(path)
        except AttributeError:  # added in on_save_checkpoint
            continue
        known = (*owner._parameters, *owner._buffers)  # noqa: SLF001 - has no public name
        if own not in known and vars(owner).get(own) is None:
            vars(owner).pop(own, None)
            owner.register_parameter(own, nn.Parameter(tensor.detach().cpu(), requires_grad=False))


_FLAT, _FLATTENED = "_is_flat_param", "_fsdp_flattened"
_MARKS = ("full_tensor", "ds_id", "local_shards", _FLATTENED)
"""What a part has: of a ``DTensor``, under DeepSpeed, of a ``ShardedTensor``, and under FSDP1."""


def _views_of_flat(module: nn.Module, state: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield FSDP1's flat parameters, and what it leaves in the places of those that are in them.

    The memory of such a view may be gone: reading it ends the process.
    """
    yield from (tensor for tensor in module.parameters() if hasattr(tensor, _FLAT))
    for path, submodule in module.named_modules():
        for name, value in vars(submodule).items():
            in_its_place = plain_name(f"{path}.{name}" if path else name) in state
            if isinstance(value, torch.Tensor) and (hasattr(value, _FLAT) or in_its_place):
                yield value


def _is_part(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and any(hasattr(tensor, mark) for mark in _MARKS)


@contextmanager
def _together(value: Any) -> Iterator[Any]:
    """Give a whole tensor for a part of one; all processes must come here. Others stay."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            yield value
    elif hasattr(value, "local_shards"):
        yield gathered_shards(value)
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
