"""Names of metrics, files and folders may hold anything; files of others are not believed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
import zoo
from mlflow import MlflowClient
from onnx.external_data_helper import set_external_data
from torch import nn

import onnxport
from onnxport import MLflow, OnnxExport, UnsafeFileError
from onnxport.report import Provenance
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.job import Job, read_job, save_job
from onnxport.tracking.mlflow import MlflowTracker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

METRICS = (
    "plain/score",
    "../up",
    "/root",
    "a//b",
    "a/",
    "..",
    ".",
    "精度",
    "正解",
    "<script>alert(1)</script>",
    "'; DROP TABLE runs; --",
    "new\nline",
    "x" * 300,
)
STEM = """<b>&'";$(touch x)`y`\n\u202e{epoch}"""


class Talkative(zoo.Classifier):
    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["image"])
        for number, name in enumerate(METRICS):
            self.log(name, float(number))


def test_any_name_is_told_to_mlflow(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    export = OnnxExport(core="trace", background=False, mlflow=MLflow(tracking_uri=store))
    saves = zoo.checkpoints(tmp_path, save_top_k=-1, filename=STEM)
    trainer = zoo.trainer(tmp_path, saves, export, epochs=1)
    trainer.fit(Talkative(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    (report,) = export.reports
    assert report.ok, report.error
    assert report.tracking is not None
    assert report.tracking.missing == ""
    client = MlflowClient(tracking_uri=store)
    logged = client.get_logged_model(str(report.tracking.model_id))
    values = [metric.value for metric in logged.metrics if not metric.key.startswith("onnx/")]
    assert set(values) >= set(range(len(METRICS)))
    assert set(logged.name) <= set("_b touchxy$epoch=0()")
    # One model, one checkpoint, one report and one store; nothing lies where a name has led to.
    assert not (tmp_path / "x").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoints", "mlflow.db", "mlartifacts"}


@pytest.fixture
def told(tmp_path: Path) -> tuple[Model, MlflowTracker]:
    """A proven model, and a server to be told of it."""
    path = tmp_path / "models" / "m.onnx"
    path.parent.mkdir()
    report = onnxport.export(nn.Linear(4, 3), torch.randn(8, 4), path, core="trace")
    address = RunAddress(
        uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_root=(tmp_path / "artifacts").as_uri()
    )
    model = Model.of_file(path, replace(report, global_step=1), Provenance())
    assert model is not None
    return model, MlflowTracker(address)


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_a_file_of_somewhere_else_is_not_uploaded(
    name: str, told: tuple[Model, MlflowTracker], tmp_path: Path
) -> None:
    model, tracker = told
    secret = tmp_path / "secret"
    if name == "m.onnx":
        secret.write_bytes(model.path.read_bytes())
        model.path.unlink()
    else:
        secret.write_text("private")
    model.path.with_name(name).symlink_to(secret)
    changed = Model.of_file(model.path, model.report, model.origin)
    assert changed is not None
    with pytest.raises(UnsafeFileError, match="outside of its folder"):
        tracker.publish(changed, last=False)
    assert not (tmp_path / "artifacts").exists()


def test_a_link_within_a_folder_is_a_model(told: tuple[Model, MlflowTracker]) -> None:
    model, tracker = told
    model.path.rename(model.path.with_name("epoch=1.onnx"))
    model.path.symlink_to("epoch=1.onnx")
    changed = Model.of_file(model.path, model.report, model.origin)
    assert changed is not None
    assert tracker.publish(changed, last=False).missing == ""


def test_a_job_cannot_ask_the_server_for_more_than_its_place(tmp_path: Path) -> None:
    job = Job(model=tmp_path / "m.onnx", place="0" * 16, address=RunAddress(uri="http://a"))
    path = save_job(job)
    assert read_job(path, path.read_bytes()).place == job.place
    save_job(replace(job, place="' OR name LIKE '%"))
    with pytest.raises(ValueError, match="place"):
        read_job(path, path.read_bytes())


def test_a_model_that_reads_other_files_is_not_loaded(tmp_path: Path) -> None:
    net, example = nn.Linear(4, 3), torch.randn(8, 4)
    path = tmp_path / "models" / "m.onnx"
    path.parent.mkdir()
    onnxport.export(net, example, path, core="trace")
    assert onnxport.verify(path, net, example)
    proto = onnx.load(path)
    weight = next(found for found in proto.graph.initializer if len(found.dims) == 2)
    (tmp_path / "weights").write_bytes(np.asarray(net.weight.detach()).tobytes())
    set_external_data(weight, location="../weights")
    weight.ClearField("raw_data")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafeFileError, match=r"'../weights', which is not a path below"):
        onnxport.verify(path, net, example)
