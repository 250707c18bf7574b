"""One gate and one message for optional dependencies."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onnxport.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_available", "optional_import"]


def is_available(module: str) -> bool:
    """Tell whether ``module`` can be imported, without importing it.

    The module is looked up, never the distribution: ``onnxruntime-gpu`` and ``mlflow-skinny``
    provide the same modules as ``onnxruntime`` and ``mlflow``.
    """
    return importlib.util.find_spec(module) is not None


@contextmanager
def optional_import(*, extra: str, needed_for: str) -> Iterator[None]:
    """Turn an ``ImportError`` in the block into a sentence that says what to install.

    Args:
        extra: The extra of onnxport that installs the dependency.
        needed_for: What the dependency is needed for, as a noun phrase.

    Raises:
        MissingDependencyError: If an import in the block failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"{needed_for} needs the module {error.name!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'onnxport[{extra}]'"
        ) from error
