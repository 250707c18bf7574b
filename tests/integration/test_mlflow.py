"""MLflow on sqlite and over HTTP: logged models, versions, the alias, outages."""

from __future__ import annotations

import json
import random
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import torch
import zoo
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from servers import free_port

from onnxport import MLflow, OnnxExport

if TYPE_CHECKING:
    import lightning.pytorch as pl

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Metric(zoo.Classifier):
    """Logs a metric that is prescribed for each epoch."""

    def __init__(self, scores: tuple[float, ...]) -> None:
        super().__init__(zoo.cnn())
        self.scores = scores

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["image"])
        self.log("score", self.scores[self.current_epoch])


def fit(root: Path, callback: OnnxExport, scores: tuple[float, ...], logger: Any) -> pl.Trainer:
    saves = zoo.checkpoints(root, monitor="score", mode="max", filename="{epoch}", save_top_k=2)
    trainer = zoo.trainer(root, saves, callback, logger=logger, epochs=len(scores))
    trainer.fit(Metric(scores), zoo.loader(), zoo.loader(shuffle=False))
    return trainer


def logger_for(uri: str, root: Path, **options: Any) -> MLFlowLogger:
    location = {} if uri.startswith("http") else {"artifact_location": (root / "art").as_uri()}
    return MLFlowLogger("experiment", tracking_uri=uri, **location | options)


def address(request: pytest.FixtureRequest, kind: str) -> str:
    return str(request.getfixturevalue("store" if kind == "sqlite" else "server"))


@pytest.mark.parametrize("kind", ["sqlite", "http"])
def test_each_proven_model_becomes_a_logged_model_of_the_same_run(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = address(request, kind)
    callback = OnnxExport(core="trace", register=f"name-{kind}")
    logger = logger_for(uri, tmp_path)
    fit(tmp_path, callback, (0.5, 0.9, 0.7), logger)
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED"  # by the logger, not by us
    assert [report.tracking.missing for report in callback.reports] == [""] * 3
    for report in callback.reports:
        model = client.get_logged_model(report.tracking.model_id)
        assert model.status == LoggedModelStatus.READY
        assert (model.experiment_id, model.source_run_id) == (logger.experiment_id, logger.run_id)
        assert model.tags["onnxport.weights_sha256"] == report.weights_sha256
        metrics = {metric.key: metric for metric in model.metrics}
        assert metrics["score"].value == pytest.approx(report.metrics["score"])
        assert metrics["score"].step == report.global_step - 1
        ours = {key for key in metrics if key.startswith("onnx/")}
        assert {"onnx/max_abs_err", "onnx/size_mb", "onnx/export_s"} < ours
        assert 0 < metrics["onnx/latency_ms_p50"].value < 1000
        files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
        assert {"MLmodel", "model.onnx", "requirements.txt"} <= files
    assert len(run.outputs.model_outputs) == 3
    versions = client.search_model_versions(f"name = 'name-{kind}'")
    assert len(versions) == 2
    linked = client.get_logged_model(callback.reports[1].tracking.model_id)
    (link,) = json.loads(linked.tags["mlflow.modelVersions"])
    version = callback.reports[1].tracking.version
    assert (link["name"], int(link["version"])) == (f"name-{kind}", version)
    champion = client.get_model_version_by_alias(f"name-{kind}", "champion")
    assert int(champion.version) == callback.reports[1].tracking.version
    assert champion.tags["onnxport.metric.value"] == repr(callback.reports[1].metrics["score"])
    assert [report.tracking.alias for report in callback.reports][1:] == ["champion", None]


def test_the_registered_model_predicts_what_pytorch_predicts(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", register="served")
    trainer = fit(tmp_path, callback, (0.5, 0.9), logger_for(store, tmp_path))
    mlflow.set_tracking_uri(store)
    model = mlflow.pyfunc.load_model("models:/served@champion")
    (spec,) = model.metadata.signature.inputs.inputs
    assert (spec.name, spec.shape, spec.type) == ("image", (-1, 1, 8, 8), np.dtype("float32"))
    requirements = Path(mlflow.pyfunc.get_model_dependencies("models:/served@champion"))
    assert all("==" in line for line in requirements.read_text().splitlines())
    trained = Metric.load_from_checkpoint(
        trainer.checkpoint_callback.best_model_path, scores=(0.0,), weights_only=False
    ).eval()
    for rows in (1, 5):
        image = torch.randn(rows, 1, 8, 8)
        with torch.no_grad():
            expected = trained(image).numpy()
        actual = model.predict({"image": image.numpy()})["output"]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_second_run_moves_the_alias_only_when_it_is_better(store: str, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=store)
    holders, challengers = [], []
    for run, score in (("a", 0.8), ("worse", 0.7), ("better", 0.9), ("nan", float("nan"))):
        callback = OnnxExport(core="trace", register="shared")
        fit(tmp_path / run, callback, (score,), logger_for(store, tmp_path))
        holders.append(int(client.get_model_version_by_alias("shared", "champion").version))
        challengers.append(client.get_registered_model("shared").aliases.get("challenger"))
    assert holders == [1, 1, 3, 3]
    assert [each and int(each) for each in challengers] == [None, 2, 2, 2]
    assert int(client.get_model_version_by_alias("shared", "previous").version) == 1


@pytest.mark.parametrize(("policy", "versions"), [("best", 2), ("all", 3), ("end", 1)])
def test_the_policy_decides_which_models_get_a_version(
    policy: Any, versions: int, store: str, tmp_path: Path
) -> None:
    callback = OnnxExport(core="trace", mlflow=MLflow(register="n", policy=policy, alias="prod"))
    fit(tmp_path, callback, (0.5, 0.9, 0.7), logger_for(store, tmp_path))
    client = MlflowClient(tracking_uri=store)
    assert len(client.search_model_versions("name = 'n'")) == versions
    holder = client.get_model_version_by_alias("n", "prod")
    assert holder.tags["onnxport.metric.value"] == repr(callback.reports[1].metrics["score"])


def test_without_a_logger_a_store_under_the_root_is_used(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", mlflow=True, register="own")
    fit(tmp_path, callback, (0.5,), logger=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    record = callback.reports[0].tracking
    assert client.get_run(record.run_id).info.status == "FINISHED"
    model = client.get_logged_model(record.model_id)
    assert model.artifact_location.startswith((tmp_path / "mlartifacts").as_uri())
    assert client.get_model_version_by_alias("own", "champion").version in {1, "1"}


def test_without_a_logger_the_server_of_the_environment_is_used(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    root, callback = tmp_path / "run", OnnxExport(core="trace", register="own")
    trainer = zoo.trainer(root, zoo.checkpoints(root), callback, epochs=1)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    assert callback.reports[-1].tracking.uri == store
    assert MlflowClient(store).get_model_version_by_alias("own", "champion")
    assert not (root / "mlflow.db").exists()


def test_without_logger_and_without_being_asked_nothing_is_tracked(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    fit(tmp_path, callback, (0.5,), logger=False)
    assert callback.reports[0].tracking is None
    assert not (tmp_path / "mlflow.db").exists()


def test_mlflow_false_ignores_the_logger(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", mlflow=False)
    logger = logger_for(store, tmp_path)
    fit(tmp_path, callback, (0.5,), logger)
    client = MlflowClient(tracking_uri=store)
    assert client.search_logged_models([logger.experiment_id]) == []


def test_the_prefix_of_the_logger_is_kept(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    fit(tmp_path, callback, (0.5,), logger_for(store, tmp_path, prefix="fold1"))
    model = MlflowClient(tracking_uri=store).get_logged_model(callback.reports[0].tracking.model_id)
    assert "fold1-score" in {metric.key for metric in model.metrics}


def test_publishing_twice_changes_nothing(store: str, tmp_path: Path) -> None:
    from onnxport.callbacks.lightning.facts import origin_of
    from onnxport.tracking.base import Model, RunAddress
    from onnxport.tracking.mlflow import MlflowTracker

    callback = OnnxExport(core="trace", register="once")
    logger = logger_for(store, tmp_path)
    trainer = fit(tmp_path, callback, (0.5,), logger)
    (report,) = callback.reports
    options = MLflow(register="once")
    again = RunAddress(
        uri=store, run_id=logger.run_id, experiment_id=logger.experiment_id, options=options
    )
    model = Model.of_file(Path(report.path), report, origin_of(trainer, report.checkpoint))
    record = MlflowTracker(again).publish(model, last=True)
    assert record == report.tracking
    client = MlflowClient(tracking_uri=store)
    assert len(client.search_logged_models([logger.experiment_id])) == 1
    assert len(client.search_model_versions("name = 'once'")) == 1


def seconds_added_by_tracking(root: Path, uri: str) -> tuple[float, OnnxExport]:
    """Fit against a server and return how long tracking held the loop up, in all."""
    from onnxport.tracking.outbox import InlineOutbox

    spent = 0.0
    submit = InlineOutbox.submit

    def timed(*args: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return submit(*args, **options)
        finally:
            spent += time.perf_counter() - start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineOutbox, "submit", timed)
        callback = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=uri, register="x"))
        fit(root, callback, (0.1, 0.2, 0.3, 0.4), logger=False)
    return spent, callback


def test_a_closed_port_holds_training_up_for_less_than_two_seconds(tmp_path: Path) -> None:
    spent, callback = seconds_added_by_tracking(tmp_path, f"http://127.0.0.1:{free_port()}")
    assert spent < 2
    assert_all_missing(callback)


def test_a_server_that_never_answers_neither(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        spent, callback = seconds_added_by_tracking(tmp_path, uri)
    assert spent < 2
    assert_all_missing(callback)


def assert_all_missing(callback: OnnxExport) -> None:
    assert len(callback.reports) == 4
    for report in callback.reports:
        assert report.ok
        assert "are missing from http://127.0.0.1" in report.tracking.missing
        assert report.tracking.model_id is None


def test_a_server_that_comes_back_gets_what_is_still_there(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxport.errors import TrackingError
    from onnxport.tracking import mlflow as tracking

    calls = 0
    check = tracking.require_reachable

    def down_at_first(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise TrackingError("the server does not answer (injected)")
        check(*args)

    monkeypatch.setattr(tracking, "require_reachable", down_at_first)
    callback = OnnxExport(core="trace", register="back")
    fit(tmp_path, callback, (0.5, 0.9, 0.7), logger_for(server, tmp_path))
    kept = [r for r in callback.reports if Path(r.path).exists()]
    assert [report.tracking.missing for report in kept] == ["", ""]
    client = MlflowClient(tracking_uri=server)
    best = client.get_model_version_by_alias("back", "champion")
    assert best.tags["onnxport.metric.value"] == repr(callback.reports[1].metrics["score"])


def test_the_fluent_state_of_the_user_stays(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", register="fluent")
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("mine")
    with mlflow.start_run() as run:
        fit(tmp_path, callback, (0.5,), logger_for(store, tmp_path))
        assert mlflow.active_run().info.run_id == run.info.run_id
        mlflow.log_metric("still", 1.0)
    client = MlflowClient(tracking_uri=store)
    assert client.get_run(run.info.run_id).data.metrics == {"still": 1.0}
    assert client.search_logged_models([run.info.experiment_id]) == []


def test_a_run_of_our_own_draws_no_random_number_of_training(store: str, tmp_path: Path) -> None:
    def numbers(mlflow: Any, name: str) -> list[float]:
        drawn: list[float] = []

        class Draws(zoo.Classifier):
            def training_step(self, *batch: Any) -> Any:
                drawn.append(random.random())  # noqa: S311 - as a user would
                return super().training_step(*batch)

        saves = zoo.checkpoints(tmp_path / name)
        callback = OnnxExport(core="trace", mlflow=mlflow)
        random.seed(3)
        zoo.trainer(tmp_path / name, saves, callback, epochs=2).fit(Draws(zoo.cnn()), zoo.loader())
        return drawn

    on = numbers(MLflow(tracking_uri=store, register="n"), "on")
    assert on == numbers(False, "off")
    assert len(on) == 6
