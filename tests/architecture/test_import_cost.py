"""Importing the package costs no training framework, no tracker and no runtime."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("lightning", "pytorch_lightning", "mlflow", "onnxruntime", "transformers")


def heavy_after(statement: str) -> list[str]:
    """The heavy modules that a fresh process holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "statement",
    ["import onnxport", "from onnxport import Verify, MLflow, Example, ExportReport"],
)
def test_importing_the_package_or_its_values_loads_nothing_heavy(statement: str) -> None:
    assert heavy_after(statement) == []


def test_importing_what_does_the_work_loads_nothing_heavy_before_it_is_used() -> None:
    assert heavy_after("from onnxport import OnnxExport, export, verify") == []


def test_the_package_alone_does_not_even_load_torch() -> None:
    code = "import onnxport, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_probe_of_these_tests_notices_what_is_loaded() -> None:
    assert heavy_after("import onnxruntime") == ["onnxruntime"]
