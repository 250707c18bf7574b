"""One class for two Lightnings, which do not know each other."""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from typing import Any

from typing_extensions import override

from onnxport._optional import is_available, optional_import

__all__ = ["FrameworkAware", "teller", "unpickled"]

_FRAMEWORKS = ("lightning.pytorch", "pytorch_lightning")


class FrameworkAware(type):
    """Makes instances that are callbacks of the Lightning that the user imported.

    ``lightning.pytorch.Callback`` and ``pytorch_lightning.Callback`` are different classes, and a
    trainer takes only its own. Which one is meant is known when the callback is made: its trainer
    was imported by then.
    """

    @override
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type.__call__(_bound(cls, _imported_frameworks()), *args, **kwargs)


def _imported_frameworks() -> tuple[str, ...]:
    imported = tuple(name for name in _FRAMEWORKS if name in sys.modules)
    if imported:
        return imported
    return tuple(name for name in _FRAMEWORKS if is_available(name.partition(".")[0]))[:1]


@lru_cache
def _bound(cls: type, frameworks: tuple[str, ...]) -> type:
    with optional_import(extra="lightning", needed_for="The Lightning callback"):
        if not frameworks:
            raise ImportError("neither is installed", name="lightning")
        callbacks = [importlib.import_module(name).Callback for name in frameworks]
    missing = [callback for callback in callbacks if not issubclass(cls, callback)]
    if not missing:
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_unbound": cls}
    return type(cls)(cls.__name__, (cls, *missing), names)


def unpickled(cls: type, state: dict[str, Any]) -> Any:
    """Make an instance from its class as written by the user and its attributes."""
    instance: Any = object.__new__(_bound(cls, _imported_frameworks()))
    vars(instance).update(state)
    return instance


def teller(cls: type) -> Any:
    """Return the framework's own way to tell the user something, which shows by default."""
    framework = next(
        name for base in cls.__mro__ for name in _FRAMEWORKS if base.__module__.startswith(name)
    )
    return importlib.import_module(f"{framework}.utilities.rank_zero").rank_zero_info
