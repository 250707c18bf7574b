"""Jobs on their way to a server: whoever raises, dies, or comes late, none is lost."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

import onnxport
from onnxport.config import MLflow
from onnxport.report import Provenance, TrackingRecord
from onnxport.tracking import outbox as of_outbox
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.courier import Courier
from onnxport.tracking.job import Job, job_path, save_job
from onnxport.tracking.outbox import ProcessOutbox
from onnxport.tracking.server import Server

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from onnxport.report import ExportReport

pytestmark = [pytest.mark.integration, pytest.mark.worker, pytest.mark.filterwarnings("ignore")]

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return onnxport.export(nn.Linear(4, 2), torch.zeros(3, 4), path, core="trace")


@pytest.fixture
def address(store: str) -> RunAddress:
    return RunAddress(uri=store, fit="fit", options=MLflow(experiment="e"))


@pytest.fixture
def outbox(address: RunAddress) -> Iterator[ProcessOutbox]:
    made = ProcessOutbox(address)
    yield made
    made.close("FINISHED")


def job_of(name: str, folder: Path, report: ExportReport, address: RunAddress) -> Job:
    path = folder / f"{name}.onnx"
    path.write_bytes(Path(str(report.path)).read_bytes())
    content = Model.of_file(path, replace(report, path=str(path)), Provenance(metrics={"a": 1.0}))
    assert content is not None
    return Job(model=path, place=content.place, address=address, content=content)


def held(address: RunAddress) -> list[str]:
    client = MlflowClient(address.uri)
    experiment = client.get_experiment_by_name("e")
    models = client.search_logged_models([experiment.experiment_id]) if experiment else []
    return sorted(f"{model.name} {model.status.value}" for model in models)


def test_who_is_told_may_raise(
    outbox: ProcessOutbox, address: RunAddress, report: ExportReport, tmp_path: Path
) -> None:
    told: list[TrackingRecord] = []

    def raises(record: TrackingRecord) -> None:
        told.append(record)
        raise OSError(5, "Input/output error")

    for name in ("first", "second"):
        outbox.submit(job_of(name, tmp_path, report, address), raises)
    start = time.monotonic()
    outbox.drain(LIMIT_S, lambda _: None)
    assert time.monotonic() - start < LIMIT_S
    assert [record.missing for record in told] == ["", ""]
    assert held(address) == ["first READY", "second READY"]


def test_a_note_has_one_entry_whichever_way_it_came(
    outbox: ProcessOutbox,
    address: RunAddress,
    report: ExportReport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = save_job(job_of("model", tmp_path, report, address))
    told: list[str] = []
    outbox.adopt(Path(os.path.relpath(earlier)), lambda _: told.append("earlier"))
    outbox.submit(job_of("model", tmp_path, report, address), lambda _: told.append("later"))
    start = time.monotonic()
    outbox.drain(LIMIT_S, lambda _: None)
    assert time.monotonic() - start < LIMIT_S
    assert told[-1] == "later"
    assert not earlier.exists()


@pytest.mark.exhaustive
def test_what_comes_after_the_end_starts_nothing_that_nobody_ends(
    outbox: ProcessOutbox, address: RunAddress, report: ExportReport, tmp_path: Path
) -> None:
    outbox.close("FINISHED")
    told: list[TrackingRecord] = []
    outbox.submit(job_of("late", tmp_path, report, address), told.append)
    assert outbox._process.poll() is not None
    assert job_path(tmp_path / "late.onnx").exists()
    outbox.drain(LIMIT_S, lambda _: None)  # a checkpoint that is saved after training waits
    outbox.close("FINISHED")
    assert [record.missing for record in told] == [""]
    assert outbox._process.poll() is not None
    assert held(address) == ["late READY"]


def test_an_answer_about_an_older_job_is_none_about_the_newer_one(
    address: RunAddress, report: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessOutbox, "_start", lambda _: None)
    outbox = ProcessOutbox(address)
    older, newer = (job_of("last", tmp_path, report, address) for _ in range(2))
    told: list[TrackingRecord] = []
    outbox.submit(older, told.append)
    outbox.submit(newer, told.append)
    told.clear()  # that nobody could be started
    gone = {"job": str(job_path(newer.model)), "token": "", "record": None, "left": False}
    outbox._answered({**gone, "asked": older.token})
    assert [entry.job for entry in outbox._entries.values()] == [newer]
    outbox._answered({**gone, "asked": newer.token})  # the note is lost, and nobody told us
    assert outbox._entries == {}
    assert outbox._note_late() == [job_path(newer.model)]
    record = {"uri": address.uri, "model_id": "m"}
    outbox._answered({**gone, "asked": older.token, "token": newer.token, "record": record})
    assert [each.model_id for each in told] == ["m"]
    assert outbox._entries == {}


def test_a_system_without_threads_left_ends_no_training(
    address: RunAddress, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(of_outbox.threading.Thread, "start", refused)
    outbox = ProcessOutbox(address)
    assert outbox._process is None
    assert "did not start: can't start new thread" in caplog.text
    outbox.close("FINISHED")


def test_what_one_disk_refuses_holds_up_nothing_on_another_one(
    address: RunAddress, report: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessOutbox, "_start", lambda _: None)
    outbox = ProcessOutbox(address)
    told: list[TrackingRecord] = []
    jobs = []
    for folder in (tmp_path / "bad", tmp_path / "good"):
        folder.mkdir()
        jobs.append(job_of("model", folder, report, address))
        shutil.rmtree(folder)
        outbox.submit(jobs[-1], told.append)
    assert ["could not be noted" in record.missing for record in told] == [True, True]
    (tmp_path / "good").mkdir()
    assert outbox._note_late() == [job_path(jobs[1].model)]
    outbox.close("FINISHED")


def test_what_another_process_is_at_is_left_until_that_is_done(
    address: RunAddress, report: ExportReport, tmp_path: Path
) -> None:
    tried: list[str] = []
    courier = Courier(lambda _: Tracker(tried, ValueError()))
    note = save_job(job_of("good", tmp_path, report, address))
    with note.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        carried = courier.carry_out(note, "there")
        assert (carried.left, carried.record, tried) == (True, None, [])
    assert not courier.carry_out(note, "there").left
    assert tried == ["good"]


class Tracker:
    """Refuses some models, for reasons of their own."""

    def __init__(self, tried: list[str], error: Exception) -> None:
        self.tried, self.error = tried, error

    def publish(self, model: Model, *, last: bool) -> TrackingRecord:
        self.tried.append(model.path.stem)
        if model.path.stem == "bad":
            raise self.error
        return TrackingRecord(uri="there", model_id=f"of {last}")


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), ValueError("no such model"), onnxport.ExportError("x")],
)
def test_a_model_that_fails_alone_lets_no_others_wait(
    error: Exception, address: RunAddress, report: ExportReport, tmp_path: Path
) -> None:
    tried: list[str] = []
    answers: list[dict[str, Any]] = []
    server = Server(Courier(lambda _: Tracker(tried, error)), answers.append)
    for name in ("bad", "good", "better"):
        server._carry_out(str(save_job(job_of(name, tmp_path, report, address))), "there", "")
    assert tried == ["bad", "good", "better"]
    assert [answer["left"] for answer in answers] == [True, False, False]
    assert str(error) in answers[0]["record"]["missing"]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no way"), KeyError("run_id"), TimeoutError("timed out"), BrokenPipeError()],
    ids=repr,
)
def test_while_a_server_is_down_each_failed_model_gets_its_turn(
    error: Exception, address: RunAddress, report: ExportReport, tmp_path: Path
) -> None:
    tried: list[str] = []
    server = Server(Courier(lambda _: Tracker(tried, error)), lambda _: None)
    for name in ("bad", "good", "better"):
        server._carry_out(str(save_job(job_of(name, tmp_path, report, address))), "there", "")
    assert tried == ["bad"]
    server._try_again()
    assert tried == ["bad", "bad"]
    server._try_again()  # others were put before it
    assert tried == ["bad", "bad", "good", "better", "bad"]
