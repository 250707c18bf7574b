"""The folder that MLflow gets: whole, small in memory, and loadable wherever it is copied."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import onnxport
from onnxport.exporter import writer
from onnxport.report import ExportReport, Provenance
from onnxport.tracking.base import Model
from onnxport.tracking.package import model_files_in_order, package_model

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

LOGGED = SimpleNamespace(model_id="m-1", artifact_location="mlflow-artifacts:/x")


def model_of(report: ExportReport, row: Any = None) -> Model:
    model = Model.of_file(Path(str(report.path)), report, Provenance(), row)
    assert model is not None
    return model


@pytest.fixture(params=["inside", "beside"])
def exported(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, ExportReport]:
    if request.param == "beside":
        monkeypatch.setattr(writer, "EXTERNAL_DATA_BYTES", 1000)
    module = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    path = tmp_path / "a#b %20=c.onnx"
    report = onnxport.export(module, torch.randn(3, 6), path, core="trace")
    assert path.with_name(f"{path.name}.data").exists() == (request.param == "beside")
    return module, report


def test_a_copy_of_the_folder_predicts_what_pytorch_predicts(
    exported: tuple[nn.Module, ExportReport], tmp_path: Path
) -> None:
    module, report = exported
    package_model(model_of(report), tmp_path / "package", LOGGED, "run")
    files = model_files_in_order(tmp_path / "package")
    assert files[-1].name == "MLmodel"
    assert all(set(file.name) <= set("abcdefghijklmnopqrstuvwxyzML_.") for file in files)
    (tmp_path / "copy").mkdir()
    for file in files:
        shutil.copyfile(file, tmp_path / "copy" / file.name)
    for path in list(Path(str(report.path)).parent.glob("a#b*")):
        path.unlink()
    onnx.checker.check_model(tmp_path / "copy" / "model.onnx")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "copy"))
    (name,) = (spec.name for spec in report.inputs)
    for rows in (1, 5):
        x = torch.randn(rows, 6)
        with torch.no_grad():
            expected = module.eval()(x).numpy()
        (actual,) = loaded.predict({name: x.numpy()}).values()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    sizes = sum(file.stat().st_size for file in (tmp_path / "copy").iterdir())
    assert abs(loaded.metadata.model_size_bytes - sizes) < 3000  # MLmodel itself


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2000, 2000)
    report = onnxport.export(module, torch.randn(3, 2000), tmp_path / "model.onnx", core="trace")
    package_model(model_of(report), tmp_path / "first", LOGGED, "run")  # imports
    tracemalloc.start()
    package_model(model_of(report), tmp_path / "second", LOGGED, "run")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000  # of 16 MB


def test_a_row_is_the_input_example(
    exported: tuple[nn.Module, ExportReport], tmp_path: Path
) -> None:
    _, report = exported
    (name,) = (spec.name for spec in report.inputs)
    row = {name: np.arange(6, dtype=np.float32)[None]}
    package_model(model_of(report, row), tmp_path / "package", LOGGED, "run")
    served = json.loads((tmp_path / "package" / "serving_input_example.json").read_text())
    assert served == {"inputs": {name: [[0, 1, 2, 3, 4, 5]]}}
