"""What is exported of a module: itself, a submodule, a method, or what the user wraps around it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from typing_extensions import override

from onnxport._torch_compat import unwrapped
from onnxport.errors import ConfigurationError, ExportError

__all__ = ["FunctionModule", "Target", "find_target", "is_method", "require_target", "target_text"]

Target = str | Callable[[nn.Module], Any]
"""``""``, the dotted name of a submodule or method, or what makes a module of the trained one."""


class FunctionModule(nn.Module):
    """A function that uses a module, in the place of a module.

    Args:
        owner: The module.
        make: Gives the function for the module. It is asked at each run, so that a function that
            was made for the owner always sees this one, and not the one that it is a copy of.
    """

    def __init__(self, owner: nn.Module, make: Callable[[nn.Module], Callable[..., Any]]) -> None:
        super().__init__()
        self.owner = owner
        self._make = make
        self.training = owner.training

    @property
    def function(self) -> Callable[..., Any]:
        """The function, with its own signature."""
        return self._make(self.owner)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._make(self.owner)(*args, **kwargs)


def find_target(module: nn.Module, target: Target) -> nn.Module:
    """Return what is to be exported of a module, as a module.

    Args:
        module: The whole module; where ``target`` wraps it, a copy that belongs to the caller.
        target: See :data:`Target`.

    Raises:
        ConfigurationError: If there is nothing of that name, or the wrapper gives nothing to call.
        ExportError: If the wrapper raises.
    """
    if isinstance(target, str):
        owner, method = _look_up(module, target)
        return owner if not method else FunctionModule(owner, operator.attrgetter(method))
    try:
        made = target(module)
    except Exception as error:
        raise ExportError(
            f"target={target_text(target)} raised {type(error).__name__}: {error}. It gets a copy "
            "of the module on the CPU, in eval mode, and returns a module or a function."
        ) from error
    if isinstance(made, nn.Module):
        return made
    if callable(made):
        return FunctionModule(module, target)
    raise ConfigurationError(
        f"target={target_text(target)} must return a module or a function, and returned "
        f"{type(made).__name__}."
    )


def require_target(module: nn.Module, target: Target) -> None:
    """Refuse the name of a submodule or method that is not there.

    Raises:
        ConfigurationError: With the names of the children.
    """
    if isinstance(target, str):
        _look_up(module, target)


def is_method(module: nn.Module, target: Target) -> bool:
    """Tell whether a target names a method."""
    return isinstance(target, str) and bool(_look_up(module, target)[1])


def target_text(target: Target) -> str:
    """Name a target in reports."""
    if isinstance(target, str):
        return target
    return str(getattr(target, "__qualname__", type(target).__qualname__))


def _look_up(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return a submodule and the name of its method, or ``""`` for the submodule itself.

    Raises:
        ConfigurationError: If there is neither.
    """
    try:
        return module.get_submodule(name), ""
    except AttributeError:
        parent, _, method = name.rpartition(".")
    try:
        # The wrappers of torch.compile and of FSDP1 have none of its methods.
        owner = unwrapped(module.get_submodule(parent))
    except AttributeError:
        owner = None
    found = getattr(type(owner), method, None)
    if owner is not None and method == "forward":
        return owner, ""
    if owner is not None and callable(found) and not hasattr(nn.Module, method):
        return owner, method
    names = [name for name, _ in module.named_children()]
    raise ConfigurationError(
        f"target={name!r} is no submodule and no method of {type(module).__name__}, whose "
        f"submodules are {names!r}."
    )
