"""Every example in a docstring does what it says."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
from importlib import import_module
from types import ModuleType

import pytest

import onnxport

MODULES = [module.name for module in pkgutil.walk_packages(onnxport.__path__, "onnxport.")]


@pytest.mark.parametrize("name", ["onnxport", *MODULES])
def test_the_examples_of_a_module_give_what_they_promise(name: str) -> None:
    module = import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    assert (result.attempted > 0) == (">>> " in inspect.getsource(module))


def test_an_example_that_is_wrong_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert doctest.testmod(wrong).failed == 1
    assert "Expected:\n    3" in capsys.readouterr().out
