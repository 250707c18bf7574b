"""What users may import: each change of it shows here."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest

import onnxport
from onnxport import errors

PUBLIC = [
    "Background",
    "Cadence",
    "Check",
    "ConfigurationError",
    "Example",
    "ExportError",
    "ExportReport",
    "InputInferenceError",
    "Inputs",
    "MLflow",
    "Metrics",
    "MissingDependencyError",
    "OnnxExport",
    "OnnxportError",
    "ProviderError",
    "PublishError",
    "Tolerance",
    "TrackingError",
    "TrackingRecord",
    "UnsafeFileError",
    "VerificationError",
    "Verify",
    "WorkerError",
    "__version__",
    "backfill",
    "export",
    "resume",
    "sync",
    "verify",
    "weights_sha256",
]
MODULES = [module.name for module in pkgutil.walk_packages(onnxport.__path__, "onnxport.")]


def test_the_public_names_are_exactly_these() -> None:
    assert onnxport.__all__ == PUBLIC
    assert dir(onnxport) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_has_a_docstring(name: str) -> None:
    value = getattr(onnxport, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert value.__name__ == name
    assert value.__module__.startswith("onnxport.")
    assert inspect.cleandoc(vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__)


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(PUBLIC)


def test_a_star_import_gives_the_public_names() -> None:
    scope: dict[str, object] = {}
    exec("from onnxport import *", scope)  # noqa: S102 - a star import stands at module level only
    assert sorted(scope.keys() - {"__builtins__"}) == PUBLIC


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'onnxport' has no attribute 'nothing'"):
        onnxport.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'onnxport'"):
        exec("from onnxport import nothing", {})  # noqa: S102


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for_and_lists_names_that_exist(name: str) -> None:
    module = import_module(name)
    assert module.__doc__
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    assert [missing for missing in listed if not hasattr(module, missing)] == []
