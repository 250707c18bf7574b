"""What could not be told a server is told later: by the command, or by the next fit."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zoo
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from servers import free_port

import onnxport
from onnxport import Background, ConfigurationError, MLflow, OnnxExport
from onnxport.pipeline.report_files import read_report
from onnxport.tracking.job import jobs_in, model_of, read_job, save_job

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def closed_port() -> str:
    return f"http://127.0.0.1:{free_port()}"


def fit(root: Path, uri: str, *, epochs: int = 2, **options: Any) -> OnnxExport:
    tracked = MLflow(tracking_uri=uri, register="n")
    export = OnnxExport(core="trace", mlflow=tracked, **options)
    saves = zoo.checkpoints(root, save_top_k=-1, filename=f"{epochs}-{{epoch}}")
    zoo.trainer(root, saves, export, epochs=epochs).fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    return export


def point_to(folder: Path, store: str) -> None:
    """Let what is noted be for another server, as if it had come back."""
    from dataclasses import replace

    for path in list(jobs_in([folder])):
        job = read_job(path, path.read_bytes())
        save_job(replace(job, address=replace(job.address, uri=store)))


def assert_all_told(store: str, folder: Path, count: int) -> None:
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("onnxport").experiment_id
    models = client.search_logged_models([experiment])
    assert len(models) == count
    assert {model.status for model in models} == {LoggedModelStatus.READY}
    assert len({model.source_run_id for model in models}) == 1
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert list(jobs_in([folder])) == []
    for path in folder.glob("*.onnx"):
        report = read_report(path)
        assert report is not None
        assert report.tracking is not None
        assert report.tracking.missing == ""


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A run whose server was down."""
    export = fit(tmp_path, closed_port())
    assert all("Connection refused" in report.tracking.missing for report in export.reports)
    folder = tmp_path / "checkpoints"
    assert len(list(jobs_in([folder]))) == 2
    return folder


def test_sync_tells_the_rest_and_nothing_twice(left: Path, store: str) -> None:
    point_to(left, store)
    told = onnxport.sync(left.parent)
    assert sorted(told) == sorted(left.glob("*.onnx"))
    assert [record.missing for record in told.values()] == ["", ""]
    assert_all_told(store, left, 2)
    assert onnxport.sync(left) == {}


def test_what_still_cannot_be_told_stays_noted(left: Path) -> None:
    told = onnxport.sync(left)
    assert all("Connection refused" in record.missing for record in told.values())
    assert len(list(jobs_in([left]))) == 2


def test_a_folder_that_was_moved(left: Path, store: str, tmp_path: Path) -> None:
    point_to(left, store)
    moved = left.rename(tmp_path / "elsewhere")
    onnxport.sync(moved)
    assert_all_told(store, moved, 2)


def test_the_command(left: Path, store: str) -> None:
    def command() -> subprocess.CompletedProcess[str]:
        run = [str(Path(sys.executable).with_name("onnxport")), "sync", str(left)]
        return subprocess.run(run, capture_output=True, text=True, check=False, timeout=200)

    down = command()
    assert down.returncode == 1
    assert "0 of 2 models told." in down.stdout
    point_to(left, store)
    up = command()
    assert up.returncode == 0, up.stderr
    assert "version 1 of n" in up.stdout
    assert "2 of 2 models told." in up.stdout
    assert "Nothing is left to tell here." in command().stdout


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:50],
        lambda _: "[]",
        lambda text: text.replace('"version": 1', '"version": 9'),
    ],
)
def test_a_damaged_note_hides_no_good_one(
    damage: Callable[[str], str], left: Path, store: str
) -> None:
    point_to(left, store)
    first, _ = jobs_in([left])
    first.write_text(damage(first.read_text()))
    told = onnxport.sync(left)
    assert "damaged" in told.pop(model_of(first)).missing
    assert [record.missing for record in told.values()] == [""]
    assert list(jobs_in([left])) == []


def test_a_model_that_is_another_one_now_is_not_told(left: Path, store: str) -> None:
    point_to(left, store)
    first, _ = jobs_in([left])
    model_of(first).write_bytes(b"something else")
    told = onnxport.sync(left)
    assert "is not the file that was proven" in told[model_of(first)].missing
    assert list(jobs_in([left])) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.worker)])
def test_the_next_fit_tells_the_rest(
    background: bool, left: Path, store: str, tmp_path: Path
) -> None:
    point_to(left, store)
    options = Background(drain_s=100) if background else False
    fit(tmp_path, store, epochs=1, background=options)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("onnxport").experiment_id
    models = client.search_logged_models([experiment])
    assert len(models) == 3
    assert {model.status for model in models} == {LoggedModelStatus.READY}
    assert len({model.source_run_id for model in models}) == 2
    assert {run.info.status for run in client.search_runs([experiment])} == {"FINISHED"}
    assert list(jobs_in([left])) == []


def test_passwords_are_not_written_down(tmp_path: Path) -> None:
    uri = closed_port().replace("http://", "http://me:secret@")
    fit(tmp_path, uri)
    found = list(jobs_in([tmp_path]))
    assert len(found) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"secret" in path.read_bytes()]


def test_a_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxport.tracking.courier import with_password

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert with_password("http://me@host:5000") == "http://me:secret@host:5000"
    assert with_password("http://me@other:5000") == "http://me@other:5000"
    assert with_password("sqlite:///here.db") == "sqlite:///here.db"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no folder"):
        onnxport.sync(tmp_path / "nothing")


def test_people_promote_and_roll_back(store: str, tmp_path: Path) -> None:
    fit(tmp_path, store)

    def command(*arguments: str) -> tuple[int, str]:
        run = [str(Path(sys.executable).with_name("onnxport")), *arguments, "--tracking-uri", store]
        done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=200)
        return done.returncode, done.stdout + done.stderr

    client = MlflowClient(store)

    def champion() -> int:
        return int(client.get_model_version_by_alias("n", "champion").version)

    assert champion() == 2
    code, text = command("rollback", "n")
    assert (code, champion()) == (0, 1), text
    assert "Version 1 of n is champion again; version 2 is rejected." in text
    code, text = command("rollback", "n")
    assert (code, champion()) == (2, 1)
    assert "onnxport promote n VERSION" in text
    code, text = command("promote", "n", "2")
    assert (code, champion()) == (0, 2), text
    assert "pinned, no training will move it" in text
    assert command("promote", "n", "7")[0] == 2


def test_a_folder_in_which_somebody_works_is_looked_through(tmp_path: Path) -> None:
    note = tmp_path / "z" / ".model.onnx.tracking"
    note.parent.mkdir()
    note.touch()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for number in range(20):
                (tmp_path / f".onnxport-{number}").mkdir()
            for number in range(20):
                (tmp_path / f".onnxport-{number}").rmdir()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(300):
            assert list(jobs_in([tmp_path])) == [note]
    finally:
        stop.set()
        worker.join()
