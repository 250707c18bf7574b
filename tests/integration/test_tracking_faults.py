"""Tracking that cannot work: training goes on, soon, and the report says what is missing."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from servers import bad_server, free_port

from onnxport import MLflow, OnnxExport
from onnxport.tracking.outbox import InlineOutbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SCORES = (0.2, 0.9, 0.3, 0.1)


class Scored(zoo.Classifier):
    def __init__(self) -> None:
        super().__init__(zoo.cnn())

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch["image"])
        self.log("acc", SCORES[self.current_epoch])


def fit(root: Path, *callbacks: Any, logger: Any = False, epochs: int = 2) -> None:
    trainer = zoo.trainer(root, *callbacks, logger=logger, epochs=epochs)
    trainer.fit(Scored(), zoo.loader(), zoo.loader(shuffle=False))


@contextmanager
def spent_in_tracking() -> Iterator[list[float]]:
    """Collect how long each call of the tracker held the loop up."""
    spent: list[float] = []

    def timed(method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("submit", "drain", "close"):
            patch.setattr(InlineOutbox, name, timed(getattr(InlineOutbox, name)))
        yield spent


def assert_all_missing(callback: OnnxExport, said: str) -> None:
    assert callback.reports
    for report in callback.reports:
        assert report.ok
        assert said in report.tracking.missing
        assert report.tracking.model_id is None


# --- the user's curves ------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_history_of_the_users_metrics_stays_as_the_logger_wrote_it(
    store: str, tmp_path: Path
) -> None:
    client = MlflowClient(store)
    histories = []
    for callbacks in ([], [OnnxExport(core="trace", register="n")]):
        root = tmp_path / str(len(callbacks))
        logger = MLFlowLogger("e", tracking_uri=store, artifact_location=(root / "a").as_uri())
        steps = ModelCheckpoint(dirpath=root / "s", every_n_train_steps=2, save_top_k=-1)
        best = zoo.checkpoints(root, monitor="acc", mode="max")
        fit(root, steps, best, *callbacks, logger=logger, epochs=4)
        keys = client.get_run(logger.run_id).data.metrics
        histories.append(
            {
                key: [(m.step, m.value) for m in client.get_metric_history(logger.run_id, key)]
                for key in keys
                if not key.startswith("onnx/")
            }
        )
    assert histories[0] == histories[1]
    assert [value for _, value in histories[0]["acc"]] == [pytest.approx(s) for s in SCORES]
    models = client.search_logged_models([logger.experiment_id])
    linked = {
        (metric.step, metric.value) for m in models for metric in m.metrics if metric.key == "acc"
    }
    assert linked == set(histories[0]["acc"])


def test_what_the_logger_did_not_write_becomes_a_tag(store: str, tmp_path: Path) -> None:
    class Unlogged(Scored):
        def validation_step(self, batch: Any, _: int) -> None:
            self(batch["image"])
            self.log("acc", 0.5, logger=False)

    callback = OnnxExport(core="trace")
    logger = MLFlowLogger("e", tracking_uri=store, artifact_location=(tmp_path / "a").as_uri())
    saves = zoo.checkpoints(tmp_path)
    trainer = zoo.trainer(tmp_path, saves, callback, logger=logger, epochs=1)
    trainer.fit(Unlogged(), zoo.loader(), zoo.loader(shuffle=False))
    client = MlflowClient(store)
    model = client.get_logged_model(callback.reports[0].tracking.model_id)
    assert model.tags["onnxport.metrics.acc"] == "0.5"
    assert client.get_metric_history(logger.run_id, "acc") == []


def test_a_run_of_our_own_gets_the_metrics(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=store))
    fit(tmp_path, zoo.checkpoints(tmp_path, save_last=True), callback)
    run_id = callback.reports[0].tracking.run_id
    history = MlflowClient(store).get_metric_history(run_id, "acc")
    assert [(m.step, m.value) for m in history] == [
        (2, pytest.approx(0.2)),
        (5, pytest.approx(0.9)),
    ]


# --- stores that cannot be used ---------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes nothing."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    (folder / "here").mkdir()
    subprocess.run(["/bin/mount", "-o", "remount,ro", str(folder)], check=True)
    yield folder
    subprocess.run(["/bin/umount", str(folder)], check=True)


@pytest.mark.parametrize("root", ["here", "new"])
def test_a_root_that_cannot_be_written(root: str, read_only: Path, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", mlflow=True, register="n", dirpath=tmp_path / "models")
    with spent_in_tracking() as spent:
        fit(read_only / root, ModelCheckpoint(dirpath=tmp_path / "c"), callback)
    assert sum(spent) < 2
    assert_all_missing(callback, "Read-only file system")


def test_a_folder_for_models_that_cannot_be_written(read_only: Path, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", dirpath=read_only / "here")
    fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    for report in callback.reports:
        assert not report.ok
        assert "Read-only file system" in str(report.error)
        assert "dirpath=" in str(report.error)


@pytest.mark.parametrize("scheme", ["postgresql", "mysql", "mysql+pymysql"])
def test_a_database_with_a_closed_port(scheme: str, tmp_path: Path) -> None:
    uri = f"{scheme}://user:secret@127.0.0.1:{free_port()}/db"
    callback = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=uri))
    with spent_in_tracking() as spent:
        fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    assert sum(spent) < 2
    assert_all_missing(callback, "Connection refused")
    assert "secret" not in str(callback.reports)


def test_a_database_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlalchemy

    def hangs(*_: Any, **__: Any) -> Any:
        time.sleep(20)

    monkeypatch.setattr(sqlalchemy, "create_engine", hangs)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        uri = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/db"
        callback = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=uri))
        with spent_in_tracking() as spent:
            fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    assert sum(spent) < 2
    assert_all_missing(callback, "does not answer within")


def test_a_sqlite_store_that_somebody_has_locked(store: str, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=store))
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with spent_in_tracking() as spent:
            fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    assert sum(spent) < 2
    assert_all_missing(callback, "database is locked")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("mine, and no database at all" * 100)
    callback = OnnxExport(core="trace", mlflow=True)
    with spent_in_tracking() as spent:
        fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    assert sum(spent) < 2
    assert_all_missing(callback, "not a database")


def test_a_server_that_says_it_is_well_and_then_hangs(tmp_path: Path) -> None:
    with bad_server(20.0, healthy=True) as uri:
        callback = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=uri))
        with spent_in_tracking() as spent:
            fit(tmp_path, zoo.checkpoints(tmp_path), callback, epochs=3)
    assert sum(spent[:3]) < 3.5  # one answer is waited for while training goes on
    assert_all_missing(callback, "are missing from http://127.0.0.1")


@pytest.mark.slow
def test_a_whole_fit_with_a_closed_port_takes_less_than_two_seconds_more(tmp_path: Path) -> None:
    def seconds(name: str, mlflow: Any) -> float:
        start = time.perf_counter()
        saves = zoo.checkpoints(tmp_path / name)
        fit(tmp_path / name, saves, OnnxExport(core="trace", mlflow=mlflow), epochs=4)
        return time.perf_counter() - start

    closed = MLflow(tracking_uri=f"http://127.0.0.1:{free_port()}", register="n")
    seconds("warm", mlflow=False)
    pairs = [(seconds(f"off{n}", mlflow=False), seconds(f"on{n}", closed)) for n in range(2)]
    assert min(on for _, on in pairs) - min(off for off, _ in pairs) < 2


def test_an_address_that_cannot_be_found_out_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxport.callbacks.lightning import begin as adapter

    def fails(*_: Any) -> Any:
        raise OSError("the logger does not know its run")

    monkeypatch.setattr(adapter, "run_address", fails)
    callback = OnnxExport(core="trace", mlflow=True)
    fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    assert_all_missing(callback, "the logger does not know its run")


# --- interrupted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        "create_run",
        "log_outputs",
        "log_model_artifact",
        "log_batch",
        "finalize_logged_model",
        "create_model_version",
        "set_registered_model_alias",
    ],
)
def test_ctrl_c_while_publishing_leaves_nothing_half_done(
    step: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(MlflowClient, step)
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        result = original(*args, **options)
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(MlflowClient, step, interrupted)
    options = MLflow(tracking_uri=store, register="n")
    callback = OnnxExport(core="trace", mlflow=options)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, zoo.checkpoints(tmp_path), callback)
    (report,) = callback.reports
    assert report.tracking.missing == ""
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("onnxport").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FAILED"
    (model,) = client.search_logged_models([experiment])
    assert model.status == LoggedModelStatus.READY
    assert len(client.get_metric_history(run.info.run_id, "onnx/export_s")) == 1
    (version,) = client.search_model_versions("name = 'n'")
    assert int(version.version) == report.tracking.version
    assert int(client.get_model_version_by_alias("n", "champion").version) == int(version.version)
    assert "mlflow.modelVersions" in client.get_logged_model(model.model_id).tags
