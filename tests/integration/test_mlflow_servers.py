"""MLflow as it is deployed: on PostgreSQL, behind a password, and on a database that is fresh."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import pytest
import zoo
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from servers import mlflow_server, postgres, postgres_folder

from onnxport import Background, MLflow, OnnxExport
from onnxport.tracking.job import jobs_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.integration,
    pytest.mark.worker,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
]

OPTIONS = Background(drain_s=200)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    programs = postgres_folder()
    if programs is None:
        if "ONNXPORT_REQUIRE_POSTGRES" in os.environ:
            pytest.fail("PostgreSQL is required here and is not installed")
        pytest.skip("PostgreSQL is not installed")
    with postgres(programs) as uri:
        yield uri


def fit(root: Path, export: OnnxExport, logger: Any = False) -> None:
    saves = zoo.checkpoints(root, save_top_k=-1)
    module = zoo.Classifier(zoo.cnn())
    zoo.trainer(root, saves, export, logger=logger, epochs=2).fit(module, zoo.loader())


def assert_two_whole_models(uri: str, experiment: str, name: str) -> None:
    client = MlflowClient(uri)
    models = client.search_logged_models([experiment])
    assert [model.status for model in models] == [LoggedModelStatus.READY] * 2
    for model in models:
        files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
        assert {"MLmodel", "model.onnx"} <= files
    assert len(client.search_model_versions(f"name = '{name}'")) == 2
    assert int(client.get_model_version_by_alias(name, "champion").version) == 2


def test_a_server_on_postgresql(database: str, tmp_path: Path) -> None:
    with mlflow_server(database, tmp_path) as uri:
        logger = MLFlowLogger("e", tracking_uri=uri)
        export = OnnxExport(core="trace", background=OPTIONS, register="pg-http")
        fit(tmp_path, export, logger)
        assert [report.tracking.missing for report in export.reports] == ["", ""]
        assert_two_whole_models(uri, logger.experiment_id, "pg-http")
    assert list(jobs_in([tmp_path])) == []


def test_postgresql_itself(database: str, tmp_path: Path) -> None:
    artifacts = (tmp_path / "artifacts").as_uri()
    MlflowClient(database).create_experiment("direct", artifacts)
    tracked = MLflow(tracking_uri=database, experiment="direct", register="pg")
    export = OnnxExport(core="trace", background=OPTIONS, mlflow=tracked)
    fit(tmp_path, export)
    assert [report.tracking.missing for report in export.reports] == ["", ""]
    experiment = MlflowClient(database).get_experiment_by_name("direct").experiment_id
    assert_two_whole_models(database, experiment, "pg")


@pytest.mark.exhaustive
def test_a_server_behind_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = tmp_path / "auth.ini"
    users.write_text(
        textwrap.dedent(
            f"""
            [mlflow]
            default_permission = READ
            database_uri = sqlite:///{tmp_path / "users.db"}
            admin_username = admin
            admin_password = a-long-password
            authorization_function = mlflow.server.auth:authenticate_request_basic_auth
            """
        )
    )
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    env = {"MLFLOW_AUTH_CONFIG_PATH": str(users), "MLFLOW_FLASK_SERVER_SECRET_KEY": "x"}
    with mlflow_server(store, tmp_path, "--app-name", "basic-auth", **env) as uri:
        export = OnnxExport(
            core="trace",
            background=OPTIONS,
            mlflow=MLflow(tracking_uri=uri, register="closed"),
        )
        fit(tmp_path / "without", export)
        assert all("missing from" in report.tracking.missing for report in export.reports)
        assert len(list(jobs_in([tmp_path]))) == 2
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        export = OnnxExport(
            core="trace", background=OPTIONS, mlflow=MLflow(tracking_uri=uri, register="open")
        )
        fit(tmp_path / "with", export)
        assert [report.tracking.missing for report in export.reports] == ["", ""]
        experiment = MlflowClient(uri).get_experiment_by_name("onnxport").experiment_id
        assert_two_whole_models(uri, experiment, "open")


FRESH = """
    import sys, time
    from pathlib import Path
    import zoo
    from onnxport import Background, MLflow, OnnxExport
    root, store, start = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    tracked = MLflow(tracking_uri=store, register="fresh")
    export = OnnxExport(core="trace", background=Background(drain_s=200), mlflow=tracked)
    trainer = zoo.trainer(root, zoo.checkpoints(root), export, epochs=2)
    time.sleep(max(0, start - time.time()))
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    assert [report.tracking.missing for report in export.reports] == ["", ""], export.reports
"""


@pytest.mark.exhaustive
def test_two_trainings_on_a_fresh_database(tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(textwrap.dedent(FRESH))
    store, start = f"sqlite:///{tmp_path / 'mlflow.db'}", str(time.time() + 10)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ONNXPORT_BACKGROUND", None)
    trainings = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / name), store, start],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("a", "b")
    ]
    for training in trainings:
        said, _ = training.communicate(timeout=300)
        assert training.returncode == 0, said[-3000:]
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("onnxport").experiment_id
    models = client.search_logged_models([experiment])
    assert [model.status for model in models] == [LoggedModelStatus.READY] * 4
    assert len(client.search_runs([experiment])) == 2
