"""Borrow a module from training, and make a copy of it that can be exported.

The live module is only ever *run*, once, with the checkpoint's tensors put in for its own; it is
never moved, cast or written to. Everything else happens on a copy.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from onnxport._torch_compat import (
    WRAPPERS,
    ReadOnly,
    export_context,
    is_compiled_forward,
    plain_name,
    unwrapped,
)
from onnxport.exporter.duplicate import Duplicator, Unusable
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.hooks import drop_hooks, drop_observers
from onnxport.exporter.target import find_target

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

__all__ = [
    "TRAINERS",
    "borrowed",
    "copy_module",
    "evaluate",
    "load_weights",
    "run_borrowed",
    "unsilence",
]


@contextmanager
def borrowed(
    module: nn.Module, tensors: Mapping[int, torch.Tensor] | None = None
) -> Iterator[nn.Module]:
    """Switch a live module to eval mode and give it back exactly as it was.

    For the time of the loan every submodule has copies in place of its attributes: generators,
    lists, counters, metrics and plain tensors that ``forward`` changes are not training's own.
    Afterwards the originals are back, untouched; so are random number streams, grad mode, autocast
    and the transformer fast path. What was compiled runs eagerly, so nothing is compiled anew.

    Args:
        module: The live module.
        tensors: What stands in place of parameters and buffers, by the ``id`` of these. The others
            are not protected.
    """
    submodules = list(module.modules())
    before = [dict(vars(submodule)) for submodule in submodules]
    memo = _shared(submodules) | {
        id(tensor): tensor
        for attributes in before
        for registry in ("_parameters", "_buffers")
        for tensor in attributes[registry].values()
        if tensor is not None
    }
    duplicator = Duplicator(memo | dict(tensors or {}))
    with preserved_globals(), export_context(), _eager():
        try:
            for submodule, attributes in zip(submodules, before, strict=True):
                lent = {name: duplicator.copy(value) for name, value in attributes.items()}
                vars(submodule).update(lent)
                _silence(submodule)
            for submodule in submodules:
                # Not .eval(): users override train() to keep parts frozen, and it may have effects.
                submodule.training = False
            yield module
        finally:
            for submodule, attributes in zip(submodules, before, strict=True):
                current = vars(submodule)
                for name in current.keys() - attributes.keys():
                    del current[name]
                current.update(attributes)


def _eager() -> AbstractContextManager[Any]:
    """Run what was compiled as it was written; nothing is compiled for other tensors or modes."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


TRAINERS = ("_trainer", "_fabric")
"""Attributes through which a module reaches the loop that trains it."""


def _shared(submodules: Sequence[nn.Module]) -> dict[Any, Any]:
    """Return what is never copied, by ``id``: the modules, their trainers, their compilers."""
    names = (*TRAINERS, "_compiler_ctx", "dynamo_ctx")
    values = [vars(submodule).get(name) for submodule in submodules for name in names]
    return {id(value): value for value in (*submodules, *values) if value is not None}


def _silence(module: nn.Module) -> None:
    """Keep a run that training does not know of out of its logs and its epoch means."""
    if any(name in vars(module) for name in TRAINERS):
        for name in ("log", "log_dict"):
            if hasattr(type(module), name):
                vars(module)[name] = _log_nothing


def unsilence(module: nn.Module) -> None:
    """Let a copy log again: another trainer is about to run it."""
    for part in module.modules():
        for name in ("log", "log_dict"):
            if vars(part).get(name) is _log_nothing:
                del vars(part)[name]


def _log_nothing(*_: Any, **__: Any) -> None:
    """Take the place of ``self.log``."""


def run_borrowed(
    module: nn.Module,
    state: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Any,
    *,
    target: str = "",
    without: Collection[Any] = (),
    copies: bool = True,
) -> Any:
    """Run a live module in eval mode with other weights, and leave no trace in it.

    Args:
        module: The live module.
        state: Parameters and buffers by name; what is missing is taken from the module.
        args: Positional arguments, on the module's device.
        kwargs: Keyword arguments, on the module's device.
        target: Name of the submodule or method to run.
        without: Hooks that are not called.
        copies: Run on copies of the parameters. Without copies nothing is added to the memory of
            the device, and an operator that would write to a parameter is refused beforehand;
            buffers are copied in any case.

    Raises:
        WriteAttemptedError: If there are no copies, and the module writes to a parameter.
    """
    given = {plain_name(name): tensor for name, tensor in state.items()}
    own: dict[int, torch.Tensor] = {}
    with torch.no_grad(), torch.inference_mode(False):
        for name, tensor in _own_tensors(module, target):
            if id(tensor) not in own or name in given:
                copy = copies or not isinstance(tensor, nn.Parameter)
                own[id(tensor)] = _stand_in(given.get(name, tensor), tensor, copy=copy)
    read_only = [tensor for tensor in own.values() if isinstance(tensor, nn.Parameter)]
    with borrowed(module, own), nullcontext() if copies else ReadOnly(read_only):
        drop_hooks(module, without)
        return find_target(module, target)(*args, **kwargs)


def _own_tensors(module: nn.Module, target: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers below a submodule, tied ones under each of their names."""
    inside = {id(submodule) for submodule in find_target(module, target).modules()}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        if id(submodule) not in inside:
            continue
        for registry in (submodule._parameters, submodule._buffers):  # noqa: SLF001
            for name, tensor in registry.items():
                if tensor is not None and not is_lazy(tensor):
                    yield plain_name(f"{prefix}.{name}" if prefix else name), tensor


def _stand_in(given: Any, tensor: torch.Tensor, *, copy: bool) -> torch.Tensor:
    source = given if isinstance(given, torch.Tensor) else tensor
    data = source.detach().to(device=tensor.device, dtype=tensor.dtype, copy=copy)
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def copy_module(
    module: nn.Module,
    stand_ins: Mapping[int, Any] | None = None,
    *,
    without: Collection[Any] = (),
) -> nn.Module:
    """Return a copy on the CPU that shares no tensor with the original.

    Of modules that cannot be deep-copied (locks, sockets, tensors with a history in their
    attributes) the parts are copied one by one, and only what refuses is shared. The copy knows no
    trainer, and what ``torch.compile`` wraps is unwrapped.

    Args:
        module: The module to copy.
        stand_ins: What stands in place of tensors, by their ``id``; the copy is left on its device
            then, because stand-ins may hold nothing that could be moved.
        without: Hooks that the copy does not have.
    """
    trainers = [vars(submodule).get(name) for submodule in module.modules() for name in TRAINERS]
    # A checkpoint may be saved under inference mode; tensors made there could not be exported.
    with preserved_globals(), torch.inference_mode(False), torch.no_grad():
        tensors = _copied_tensors(module) if stand_ins is None else dict(stand_ins)
        memo = tensors | {
            id(value): Unusable(type(value).__name__) for value in trainers if value is not None
        }
        clone: nn.Module = Duplicator(memo).copy(module)
    for submodule in list(clone.modules()):
        for name in TRAINERS:
            if name in vars(submodule):
                vars(submodule)[name] = None
        _silence(submodule)
        _uncompile(submodule, memo)
    clone = unwrapped(clone)
    drop_observers(clone)
    drop_hooks(clone, without)
    clone.requires_grad_(False)
    return clone if stand_ins is not None else clone.cpu()


def _uncompile(module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Take out what ``torch.compile`` left on a copy: wrappers and closures over the original."""
    children = vars(module)["_modules"]
    # A script module has no plain dict there, and nothing that torch.compile could have wrapped.
    if isinstance(children, dict) and WRAPPERS.isdisjoint(children):
        children.update({name: unwrapped(child) for name, child in children.items()})
    if vars(module).get("_compiler_ctx") is not None:  # Lightning's note of what was compiled
        vars(module)["_compiler_ctx"] = None
    for name, value in list(vars(module).items()):
        if not (isinstance(value, FunctionType) and is_compiled_forward(value)):
            continue
        original = _before_compilation(value)
        function = getattr(original, "__func__", original)
        if getattr(type(module), name, None) is function:
            del vars(module)[name]
        elif isinstance(original, MethodType):
            owner = memo.get(id(original.__self__), original.__self__)
            vars(module)[name] = MethodType(function, owner)
        else:
            vars(module)[name] = original


def _copied_tensors(module: nn.Module) -> dict[int, Any]:
    """Copy parameters and buffers straight to the CPU, as a memo for ``deepcopy``.

    On the device of the training there may be no room for a second set of weights.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) in {nn.Parameter, torch.Tensor}:
            data = tensor.detach().to("cpu", copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if is_parameter else data
    return memo


def _before_compilation(function: Any) -> Any:
    """Take a function out of the wrappers of ``torch.compile``; those of the user stay."""
    while (
        isinstance(function, FunctionType)
        and function.__globals__.get("__name__", "").startswith("torch._dynamo")
        and hasattr(function, "__wrapped__")
    ):
        function = function.__wrapped__
    return function


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Load a checkpoint's ``state_dict`` into a copy and prove that it arrived.

    Args:
        module: The copy.
        state: The checkpoint's ``state_dict``.

    Returns:
        Warnings: names that the checkpoint does not hold, whose live values are kept.

    Raises:
        ValueError: If a tensor of the checkpoint is not in the copy afterwards, bit for bit.
    """
    _settle_pruning(module, {plain_name(name) for name in state})
    loaded = module.state_dict()
    plain = OrderedDict(_plain_names(state, loaded))
    # Versions, by which modules migrate old checkpoints; one from this run needs no migration.
    plain._metadata = getattr(loaded, "_metadata", None)  # type: ignore[attr-defined]  # noqa: SLF001
    if not all(_is_one(loaded.get(name), tensor) for name, tensor in plain.items()):
        with torch.inference_mode(False), torch.no_grad():
            nn.Module.load_state_dict(module, plain, strict=False)
        loaded = module.state_dict()
    wrong = [
        name
        for name, tensor in plain.items()
        if isinstance(tensor, torch.Tensor) and not _same(loaded.get(name), tensor)
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors of the checkpoint have no place in the module, "
            f"e.g. {wrong[0]!r}. Was the state_dict edited before it was saved?"
        )
    missing = [name for name in loaded if name not in plain]
    if not missing:
        return ()
    text = (
        f"The checkpoint lacks {len(missing)} of the module's tensors, e.g. {missing[0]!r}: "
        "the model holds the live values of these."
    )
    return (text,)


def _settle_pruning(module: nn.Module, names: Collection[str]) -> None:
    """Make pruning permanent on a copy where the checkpoint has it so, as Lightning's does."""
    for prefix, submodule in module.named_modules():
        for hook in list(submodule._forward_pre_hooks.values()):  # noqa: SLF001
            if not isinstance(hook, prune.BasePruningMethod):
                continue
            name = str(hook._tensor_name)  # noqa: SLF001 - it has no public name
            path = plain_name(f"{prefix}.{name}" if prefix else name)
            if path in names and f"{path}_orig" not in names:
                with torch.inference_mode(False), torch.no_grad():
                    prune.remove(submodule, name)  # type: ignore[no-untyped-call]


def _plain_names(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        yield (name if name in own else plain_name(name)), value


def _is_one(loaded: Any, tensor: Any) -> bool:
    """Tell whether both are the same memory."""
    both = isinstance(loaded, torch.Tensor) and isinstance(tensor, torch.Tensor)
    return (
        both
        and loaded.data_ptr() == tensor.data_ptr()
        and loaded.dtype == tensor.dtype
        and loaded.shape == tensor.shape
        and loaded.stride() == tensor.stride()
    )


def _same(loaded: Any, tensor: torch.Tensor) -> bool:
    if _is_one(loaded, tensor):
        return True
    if not isinstance(loaded, torch.Tensor) or loaded.shape != tensor.shape:
        return False
    ours, theirs = loaded.detach().cpu(), tensor.detach().cpu()
    # Compared as bytes: a NaN weight is still the checkpoint's weight.
    return ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def evaluate(module: nn.Module) -> nn.Module:
    """Put every submodule of a *copy* in eval mode."""
    for submodule in module.modules():
        submodule.training = False
    return module
