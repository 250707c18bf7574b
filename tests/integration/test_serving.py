"""The champion, served by MLflow's own server: REST answers are what PyTorch computes."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from servers import ask, free_port, running
from torch import nn

import onnxport
from onnxport import Inputs
from onnxport.config import MLflow
from onnxport.report import Provenance
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.mlflow import MlflowTracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from onnxport.report import ExportReport

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),
]


class Two(nn.Module):
    """Integers and numbers in, logits and a label out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8 + 4, 3)

    def forward(self, ids: torch.Tensor, feats: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.cat([self.table(ids).mean(1), feats], 1))
        return {"logits": logits, "label": logits.argmax(1)}


class Tagger(nn.Module):
    """A row of tokens of any length in, scores for each token out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 8), nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        table = self.table(tokens)
        return self.head(table + table.mean(1, keepdim=True))


def image(rows: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(rows, 1, 8, 8)}


def two(rows: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, 20, (rows, 5)), "feats": torch.randn(rows, 4)}


def tokens(rows: int, length: int = 7) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(0, 30, (rows, length))}


class Picture(nn.Sequential):
    """One image in, logits out."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 4))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image)


@dataclass(frozen=True)
class Case:
    """A model and how its inputs are made."""

    make: Callable[[], nn.Module]
    rows: Callable[[int], dict[str, torch.Tensor]]
    axes: dict[str, dict[int, str]] | None = None


CASES = {
    "one input": Case(Picture, image),
    "two inputs": Case(Two, two),
    "sequence": Case(Tagger, tokens, {"tokens": {0: "batch", 1: "length"}}),
}


@dataclass(frozen=True)
class Champion:
    """A model in the registry, and the module that it was made of."""

    case: Case
    module: nn.Module
    report: ExportReport
    store: str

    def expected(self, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        with torch.no_grad():
            made = self.module(**inputs)
        return {
            spec.name: (made[spec.name] if isinstance(made, dict) else made).numpy()
            for spec in self.report.outputs
        }

    def assert_equal(self, inputs: dict[str, torch.Tensor], answers: dict[str, Any]) -> None:
        """Compare with what PyTorch computes, within the budget of the proof."""
        budgets = {
            output.name: output.budget for check in self.report.checks for output in check.outputs
        }
        expected = self.expected(inputs)
        assert set(answers) == set(expected)
        for name, wanted in expected.items():
            found = np.asarray(answers[name], dtype=wanted.dtype)
            assert found.shape == wanted.shape
            limit = 10 * budgets[name] if wanted.dtype.kind == "f" else 0
            assert np.abs(found - wanted).max() <= limit


@pytest.fixture(scope="module", params=list(CASES))
def champion(
    request: pytest.FixtureRequest, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Champion:
    folder = tmp_path_factory.mktemp("served")
    (folder / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    store = f"sqlite:///{folder / 'mlflow.db'}"
    torch.manual_seed(0)
    case = CASES[request.param]
    module = case.make().eval()
    inputs = case.rows(3)
    report = onnxport.export(
        module,
        onnxport.Example((), dict(inputs)),
        folder / "model.onnx",
        inputs=None if case.axes is None else Inputs(dynamic_axes=case.axes),
    )
    assert report.ok, report.error
    address = RunAddress(
        uri=store,
        fit="x",
        artifact_root=(folder / "artifacts").as_uri(),
        options=MLflow(register="served"),
    )
    row = {name: tensor[:1].numpy() for name, tensor in inputs.items()}
    model = Model.of_file(folder / "model.onnx", replace(report, global_step=1), Provenance(), row)
    assert model is not None
    record = MlflowTracker(address).publish(model, last=False)
    assert record.alias == "champion"
    return Champion(case, module, report, store)


@contextmanager
def served(champion: Champion, folder: Path) -> Iterator[str]:
    """Serve it as the documentation says; yield where to ask."""
    port = free_port()
    ours = "from onnxport.cli import main; main()"  # hands over to `mlflow models serve`
    command = [sys.executable, "-c", ours, "serve", "served", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": champion.store}
    uri = f"http://127.0.0.1:{port}"
    with running(command, uri, "ping", folder / "serve.log", environment):
        yield uri


def lists(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in inputs.items()}


def test_rest_answers_are_what_pytorch_computes(champion: Champion, tmp_path: Path) -> None:
    with served(champion, tmp_path) as url:
        for rows in (1, 5, 1000):
            inputs = champion.case.rows(rows)
            champion.assert_equal(inputs, ask(url, {"inputs": lists(inputs)}))
        if champion.case.axes:
            inputs = tokens(4, length=19)
            champion.assert_equal(inputs, ask(url, {"inputs": lists(inputs)}))
        inputs = champion.case.rows(5)
        instances = [
            {name: values[row] for name, values in lists(inputs).items()} for row in range(5)
        ]
        champion.assert_equal(inputs, ask(url, {"instances": instances}))
        if not champion.case.axes:  # MLflow reshapes columns to rows of one size
            flat = {name: tensor.reshape(5, -1).tolist() for name, tensor in inputs.items()}
            rows = [[values[row] for values in flat.values()] for row in range(5)]
            split = {"columns": list(flat), "data": rows}
            champion.assert_equal(inputs, ask(url, {"dataframe_split": split}))
        example = json.loads(
            Path(mlflow_artifact(champion, "serving_input_example.json")).read_text()
        )
        assert set(ask(url, example)) == {spec.name for spec in champion.report.outputs}


def mlflow_artifact(champion: Champion, name: str) -> str:
    mlflow.set_tracking_uri(champion.store)
    return str(mlflow.artifacts.download_artifacts(f"models:/served@champion/{name}"))


def test_pyfunc_takes_numpy_lists_and_pandas(champion: Champion) -> None:
    mlflow.set_tracking_uri(champion.store)
    model = mlflow.pyfunc.load_model("models:/served@champion")
    inputs = champion.case.rows(5)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    champion.assert_equal(inputs, model.predict(arrays))
    if len(arrays) == 1:
        (array,) = arrays.values()
        champion.assert_equal(inputs, model.predict(array))
    if not champion.case.axes:  # as above
        flat = {name: array.reshape(5, -1) for name, array in arrays.items()}
        columns = pd.DataFrame({name: list(values) for name, values in flat.items()})
        champion.assert_equal(inputs, model.predict(columns))
        of_lists = pd.DataFrame({name: values.tolist() for name, values in flat.items()})
        champion.assert_equal(inputs, model.predict(of_lists))


def test_a_server_of_many_processes_takes_one_core_for_each(champion: Champion) -> None:
    mlflow.set_tracking_uri(champion.store)
    model = mlflow.pyfunc.load_model("models:/served@champion")
    options = model._model_impl.rt.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.inter_op_num_threads == 1
