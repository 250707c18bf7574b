"""Hooks of the user: which of them a copy can do without."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

__all__ = [
    "HOOK_MARKS",
    "OBSERVES",
    "drop_hooks",
    "drop_observers",
    "hooks_of_any_kind",
    "is_observer",
    "plain_hooks",
]

OBSERVES = "_onnxport_observes"
"""Marks the hooks of observers."""

_KINDS = ("_forward_pre_hooks", "_forward_hooks")
_OTHER_KINDS = (
    *("_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
HOOK_MARKS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
"""What torch notes of hooks besides the hooks themselves."""


def plain_hooks(module: nn.Module) -> list[Any]:
    """Return the forward hooks that a copy of the module shares with it: plain functions.

    Their closures reach into the training run. Methods and objects are copied with the module.
    """
    return [hook for hook in _hooks(module) if isinstance(hook, FunctionType)]


def drop_observers(module: nn.Module) -> None:
    """Take the hooks of observers off a copy: they watch training."""
    drop_hooks(module, [hook for hook in _hooks(module) if is_observer(hook)])


def is_observer(value: object) -> bool:
    """Tell whether a value is a hook of an observer."""
    return getattr(value, OBSERVES, None) is True


def _hooks(module: nn.Module, kinds: tuple[str, ...] = _KINDS) -> list[Any]:
    return [
        hook
        for submodule in module.modules()
        for kind in kinds
        for hook in vars(submodule).get(kind, {}).values()
    ]


def hooks_of_any_kind(module: nn.Module) -> list[Any]:
    """Return all hooks: of forward, backward, and of saving and loading a ``state_dict``."""
    return _hooks(module, (*_KINDS, *_OTHER_KINDS))


def drop_hooks(module: nn.Module, hooks: Collection[Any]) -> None:
    """Take hooks off a module and all that is in it."""
    unwanted = {id(hook) for hook in hooks}
    for submodule in module.modules() if unwanted else ():
        attributes = vars(submodule)
        for kind in (*_KINDS, *_OTHER_KINDS):
            registry = attributes.get(kind, {})
            for key in [key for key, hook in registry.items() if id(hook) in unwanted]:
                for each in (kind, *HOOK_MARKS):
                    attributes.get(each, {}).pop(key, None)
