"""Borrow a module from training, and make a copy of it that can be exported.

The live module is only ever *run*, once, with the checkpoint's tensors put in for its own; it is
never moved, cast or written to. Everything else happens on a copy.
"""

from __future__ import annotations

import copy
import logging
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from onnxport._torch_compat import export_context, is_compiled_forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["borrowed", "copy_module", "evaluate", "load_weights", "preserved_rng", "run_borrowed"]

logger = logging.getLogger(__name__)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put back the random number streams of Python, NumPy and torch (CPU and CUDA)."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def borrowed(module: nn.Module) -> Iterator[nn.Module]:
    """Switch a live module to eval mode and give it back exactly as it was.

    Restored on any exit, per submodule: the ``training`` flag (a frozen BatchNorm stays frozen) and
    the attributes that ``forward`` may have rebound; and the random number streams, grad mode,
    autocast and the transformer fast path. Parameters and buffers are not protected here: run the
    module through :func:`run_borrowed`, which puts other tensors in their place.
    """
    submodules = list(module.modules())
    attributes = [_attributes(submodule) for submodule in submodules]
    flags = [submodule.training for submodule in submodules]
    with preserved_rng(), export_context():
        try:
            for submodule in submodules:
                # Not .eval(): users override train() to keep parts frozen, and it may have effects.
                submodule.training = False
            yield module
        finally:
            for submodule, before, flag in zip(submodules, attributes, flags, strict=True):
                _restore(vars(submodule), before)
                submodule.training = flag


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute, and for the registries of a module what they hold."""
    return {
        name: (value, dict(value) if name in _REGISTRIES and isinstance(value, dict) else None)
        for name, value in vars(module).items()
    }


def _restore(current: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    for name in current.keys() - before.keys():
        del current[name]
    for name, (value, held) in before.items():
        current[name] = value
        if held is not None:
            value.clear()
            value.update(held)


def run_borrowed(
    module: nn.Module, state: Mapping[str, torch.Tensor], args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Run a live module in eval mode with other weights, and leave no trace in it.

    Args:
        module: The live module.
        state: Parameters and buffers by name; what is missing is taken from the module. Buffers
            are copied, since ``forward`` may write to them.
        args: Positional arguments, on the module's device.
        kwargs: Keyword arguments, on the module's device.
    """
    # One name per place: torch would give back the wrong tensor of a module with two names.
    own = {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, submodule in module.named_modules()
        for registry in (submodule._parameters, submodule._buffers)  # noqa: SLF001
        for name, tensor in registry.items()
        if tensor is not None
    }
    tensors = {name: _like(state.get(name, tensor), tensor).clone() for name, tensor in own.items()}
    with borrowed(module):
        # Every name is given, tied ones too, so torch need not tie them again.
        return torch.func.functional_call(module, tensors, args, kwargs, tie_weights=False)


def _like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(device=other.device, dtype=other.dtype)


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy on the CPU that shares no tensor with the original.

    Modules that cannot be deep-copied (locks, sockets, generators in their attributes) are cloned
    submodule by submodule: parameters and buffers are copied, other attributes are shared.
    """
    # A checkpoint may be saved under inference mode; tensors made there could not be exported.
    with preserved_rng(), torch.inference_mode(False), torch.no_grad():
        try:
            clone = copy.deepcopy(module, _copied_tensors(module))
        except Exception as error:  # noqa: BLE001 - __deepcopy__ and __getstate__ are user code
            logger.debug("deepcopy failed (%s), cloning the structure instead", error)
            clone = _clone_structure(module)
    for submodule in clone.modules():
        # torch.compile leaves a closure over the *live* module here.
        if is_compiled_forward(vars(submodule).get("forward")):
            del submodule.forward
    return _unwrapped(clone).requires_grad_(False).cpu()


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


def _unwrapped(module: nn.Module) -> nn.Module:
    """Take the module out of the wrapper that ``torch.compile(module)`` makes."""
    original = getattr(module, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else module


def _clone_structure(module: nn.Module) -> nn.Module:
    clones: dict[int, Any] = {}

    def tensor_clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in clones:
            data = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            clones[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
        return clones[id(tensor)]  # type: ignore[no-any-return]

    def module_clone(original: nn.Module | None) -> nn.Module | None:
        if original is None:
            return None
        if id(original) not in clones:
            clone = object.__new__(type(original))
            clones[id(original)] = clone
            # Hooks and other registries of the copy are its own; what they hold is shared.
            state = {
                name: copy.copy(value) if isinstance(value, (dict, set)) else value
                for name, value in vars(original).items()
            }
            # A closure over the live module.
            state.pop("_compiled_call_impl", None)
            for kind in ("_parameters", "_buffers"):
                state[kind] = {n: tensor_clone(t) for n, t in vars(original)[kind].items()}
            state["_modules"] = {n: module_clone(m) for n, m in vars(original)["_modules"].items()}
            vars(clone).update(state)
        return clones[id(original)]  # type: ignore[no-any-return]

    clone = module_clone(module)
    if clone is None:
        raise TypeError("a module is needed, got None")
    return clone


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
    with torch.inference_mode(False), torch.no_grad():
        nn.Module.load_state_dict(module, dict(state), strict=False)
    loaded = module.state_dict()
    wrong = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not _same(loaded.get(name), tensor)
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors of the checkpoint have no place in the module, "
            f"e.g. {wrong[0]!r}. Was the state_dict edited in on_save_checkpoint?"
        )
    missing = [name for name in loaded if name not in state]
    if not missing:
        return ()
    text = (
        f"The checkpoint lacks {len(missing)} of the module's tensors, e.g. {missing[0]!r}: "
        "the model holds the live values of these."
    )
    return (text,)


def _same(loaded: Any, tensor: torch.Tensor) -> bool:
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
