"""Which modules another process finds by their names."""

from __future__ import annotations

import sys
import sysconfig
import threading
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["by_value", "is_importable"]

_INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib", "stdlib"))
_registry = threading.RLock()


def is_importable(name: str) -> bool:
    """Tell whether a process with the same path imports the same file under this name.

    A module may have been loaded by hand from a file, as configurations, plugins and pytest's
    ``importlib`` mode do it; then it is in ``sys.modules`` here and nowhere else.

    Args:
        name: Of a module that is loaded. What was not made of source counts as importable, and what
            is installed: it may have ways of its own to be found.
    """
    module = sys.modules.get(name)
    file = Path(str(getattr(module, "__file__", None)))
    if module is None or module.__name__ != name or name == "__main__":
        return True  # cloudpickle sends what is in __main__ by itself
    if not file.is_absolute() or file.suffix != ".py" or str(file).startswith(_INSTALLED):
        return True
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    for part in accumulate(name.split("."), "{}.{}".format):
        spec = _find(part, places)
        if spec is None:
            return False
        places = spec.submodule_search_locations or []
    origin = None if spec is None else spec.origin
    return origin is not None and Path(origin).resolve() == file.resolve()


def _find(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """Look for a module as an import would that does not know it yet."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, places)
        except (ImportError, AttributeError):  # finders of packages may be of any kind
            continue
        if spec is not None:
            return spec
    return None


@contextmanager
def by_value(module: ModuleType) -> Iterator[None]:
    """Pickle what a module defines by value within the block, and not by its name."""
    with _registry:
        if module.__name__ in cloudpickle.list_registry_pickle_by_value():
            yield
            return
        cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(module)
