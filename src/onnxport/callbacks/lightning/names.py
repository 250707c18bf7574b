"""One class for two Lightnings, which do not know each other."""

from __future__ import annotations

import copyreg
import importlib
import inspect
import sys
from functools import lru_cache
from typing import Any

from typing_extensions import override

from onnxport._optional import is_available, optional_import

__all__ = ["FrameworkAware", "bound", "framework_of", "teller", "unbound", "unpickled"]

_PUBLIC = {"onnxport.callbacks.lightning.callback": "onnxport.callbacks.lightning"}
"""Where the class is found again by its name, bound."""

_FRAMEWORKS = ("lightning.pytorch", "pytorch_lightning")


class FrameworkAware(type):
    """Makes instances that are callbacks of the Lightning that the user imported.

    ``lightning.pytorch.Callback`` and ``pytorch_lightning.Callback`` are different classes, and a
    trainer takes only its own. Which one is meant is known when the callback is made: its trainer
    was imported by then.
    """

    @override
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type.__call__(_bound(cls, _usable_frameworks()), *args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """What editors and ``help`` show: of the class, not of the call above."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=tuple(signature.parameters.values())[1:])

    # What was made from the class before or after another Lightning was imported is one of them.
    @override
    def __instancecheck__(cls, instance: Any) -> bool:
        return type.__instancecheck__(unbound(cls), instance)

    @override
    def __subclasscheck__(cls, subclass: type) -> bool:
        return type.__subclasscheck__(unbound(cls), subclass)


def bound(cls: type) -> type:
    """Return the class as a callback of the Lightning that is imported; itself if none is.

    Whoever reads the class by name before making it (LightningCLI) wants a callback already.
    """
    imported = _imported_frameworks()
    return _bound(cls, imported) if imported else cls


def unbound(cls: type) -> type:
    """Return the class as it was written."""
    found: type = vars(cls).get("_unbound", cls)
    return found


def _imported_frameworks() -> tuple[str, ...]:
    return tuple(name for name in _FRAMEWORKS if hasattr(sys.modules.get(name), "Callback"))


def _usable_frameworks() -> tuple[str, ...]:
    return (
        _imported_frameworks()
        or tuple(name for name in _FRAMEWORKS if is_available(name.partition(".")[0]))[:1]
    )


@lru_cache
def _bound(cls: type, frameworks: tuple[str, ...]) -> type:
    with optional_import(extra="lightning", needed_for="The Lightning callback"):
        if not frameworks:
            raise ImportError("neither is installed", name="lightning")
        callbacks = [importlib.import_module(name).Callback for name in frameworks]
    missing = [callback for callback in callbacks if not issubclass(cls, callback)]
    if not missing:
        return cls
    names = {
        "__module__": _PUBLIC.get(cls.__module__, cls.__module__),
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_unbound": unbound(cls),
    }
    return type(cls)(cls.__name__, (cls, *missing), names)


def unpickled(cls: type, state: dict[str, Any]) -> Any:
    """Make an instance from its class as written by the user and its attributes."""
    instance: Any = object.__new__(_bound(cls, _usable_frameworks()))
    vars(instance).update(state)
    return instance


def framework_of(cls: type) -> str | None:
    """Return the name of the Lightning that a class is built on, if it is on one."""
    return next(
        (
            name
            for base in cls.__mro__
            for name in _FRAMEWORKS
            if base.__module__.startswith(f"{name}.")
        ),
        None,
    )


def teller(cls: type) -> Any:
    """Return the framework's own way to tell the user something, which shows by default."""
    return importlib.import_module(f"{framework_of(cls)}.utilities.rank_zero").rank_zero_info


def _by_name(cls: type) -> Any:
    """Pickle a class: by the name of the one that was written, which is importable."""
    written = unbound(cls)
    return written.__qualname__ if written is cls else (bound, (written,))


copyreg.pickle(FrameworkAware, _by_name)
