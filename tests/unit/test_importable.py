"""What another process finds by its name, and what is sent to it by value."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import cloudpickle
import pytest
import torch

from onnxport.exporter.importable import is_importable
from onnxport.exporter.skeleton import pickle_by_value

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

SOURCE = """
from torch import nn

SCALE = 3.0

def scaled(x):
    return x * SCALE

class Net(nn.Module):
    def forward(self, x):
        return scaled(x)
"""


def load(path: Path, name: str) -> ModuleType:
    """Load a module from a file by hand."""
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["torch", "torch.nn.modules.linear", "torch.ops", "json.decoder", "onnxport.report"]
)
def test_what_an_import_finds(name: str) -> None:
    assert is_importable(name)


@pytest.mark.parametrize("name", ["loaded_by_hand", "plugins.of_mine", "json_of_mine"])
def test_what_was_loaded_by_hand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(tmp_path / "by_hand.py", name)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, name, module)
    assert not is_importable(name)
    content = pickle_by_value(module.Net())
    assert cloudpickle.list_registry_pickle_by_value() == set()
    (tmp_path / "net.pkl").write_bytes(content)
    code = "import pickle, sys, torch; print(pickle.load(open(sys.argv[1], 'rb'))(torch.ones(1)))"
    command = [sys.executable, "-c", code, str(tmp_path / "net.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{torch.full((1,), 3.0)}\n", done.stderr


def test_a_file_that_is_on_the_path_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(tmp_path / "found_again.py", "found_again")
    monkeypatch.setitem(sys.modules, "found_again", module)
    assert not is_importable("found_again")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_importable("found_again")


def test_a_file_that_has_the_name_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "twice.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setitem(sys.modules, "twice", load(tmp_path / "mine.py", "twice"))
    assert not is_importable("twice")
