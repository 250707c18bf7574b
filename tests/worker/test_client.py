"""The thread beside the worker: it comes and goes, and no order is lost on the way."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from faults.ground import EVERY, Net, train, workers_of
from faults.workers import in_worker
from lightning.pytorch.callbacks import Callback
from torch import nn

import onnxport
from onnxport import Background, OnnxExport
from onnxport.callbacks.runner import _copied
from onnxport.config import ExportOptions
from onnxport.errors import WorkerError
from onnxport.exporter.ownership import read_metadata
from onnxport.report import Provenance
from onnxport.tree import Example
from onnxport.worker import aside, client
from onnxport.worker.client import Order, Worker
from onnxport.worker.process import WorkerProcess
from onnxport.worker.protocol import Done, SentJob, WeightsFile

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.integration, pytest.mark.worker]


def order(tmp_path: Path, number: int, results: list[Any], *, memory: bool = False) -> Order:
    from onnxport.exporter.fingerprint import fingerprint
    from onnxport.exporter.skeleton import make_skeleton, pickle_by_value

    module = nn.Linear(3, 2)
    file = None if memory else tmp_path / f"{number}.pt"
    if file is not None:
        torch.save(dict(module.state_dict()), file)

    def done(result: Done | WorkerError) -> None:
        results.append(result)

    return Order(
        SentJob(
            number=number,
            session="s",
            weights=WeightsFile(path=file),
            path=tmp_path / f"{number}.onnx",
            options=ExportOptions(core="trace"),
            provenance=Provenance(),
            reference=None,
            fingerprint=fingerprint(module),
            skeleton=make_skeleton(module, module.state_dict()),
            calls=pickle_by_value(("", (Example((torch.randn(4, 3),)),))),
        ),
        done,
        _copied(module.state_dict()) if memory else None,
    )


@pytest.mark.exhaustive
def test_orders_that_come_while_the_thread_leaves_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IDLE_S", 0.05)
    worker, results = Worker(Background()), []
    for number in range(3):
        worker.submit(order(tmp_path, number, results))
        assert worker.wait("s", 120.0) == []
        # Around the moment in which the thread and its process go.
        time.sleep(0.045 + 0.01 * number)
    assert [result.report.ok for result in results] == [True] * 3
    worker.close()


@pytest.mark.exhaustive
def test_an_idle_worker_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "IDLE_S", 0.2)
    worker, results = Worker(Background()), []
    worker.submit(order(tmp_path, 0, results))
    assert worker.wait("s", 120.0) == []
    pid = worker.pid
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert worker.pid is None


def test_a_later_order_for_the_same_file_replaces_one_that_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="onnxport.events")
    worker, results = Worker(Background()), []
    for number in (0, 1, 1, 1):
        worker.submit(order(tmp_path, number, results))
    worker.forget(tmp_path / "0.onnx")
    assert worker.wait("s", 120.0) == []
    assert {result.number for result in results} == {1}
    assert len(results) <= 2  # the first may have been begun already
    dropped = [
        record for record in caplog.records if getattr(record, "event", "") == "model.dropped"
    ]
    assert len(results) + len(dropped) == 4
    worker.close()


@pytest.mark.parametrize("memory", [True, False], ids=["from memory", "from a file"])
def test_a_model_whose_checkpoint_goes_while_it_is_made_goes_too(
    memory: bool, tmp_path: Path
) -> None:
    worker, results = Worker(Background()), []
    worker.submit(order(tmp_path, 0, results, memory=memory))
    end = time.monotonic() + 60
    while worker._queue.current is None and time.monotonic() < end:
        time.sleep(0.001)
    worker.forget(tmp_path / "0.onnx")
    while worker._queue.current is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert results == []
    assert list(tmp_path.glob("*onnx*")) == []
    worker.close()


def queued(worker: Worker, tmp_path: Path, results: list[Any], kind: str) -> list[Order]:
    """Queue five sets of weights in memory."""
    orders = []
    for number in range(5):
        one = order(tmp_path, number, results, memory=True)
        checkpoint = {
            "file": str(tmp_path / f"{number}.ckpt"),
            "remote": f"s3://bucket/{number}.ckpt",
            "trial": None,
        }[kind]
        if kind == "file":
            torch.save({"state_dict": nn.Linear(3, 2).state_dict()}, str(checkpoint))
        one.job = replace(one.job, provenance=Provenance(checkpoint=checkpoint))
        orders.append(one)
        worker.submit(one)
    return orders


def in_memory(one: Order) -> bool:
    return one.weights is not None and "memfd:" in str(
        Path(f"/proc/self/fd/{one.weights}").readlink()
    )


def all_in_memory(worker: Worker, orders: list[Order]) -> list[bool]:
    with worker._changed:
        return [in_memory(one) for one in orders]


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker that takes no order."""
    monkeypatch.setattr(Worker, "_ensure_thread", lambda _: None)
    return Worker(Background())


@pytest.mark.parametrize("kind", ["file", "trial"])
def test_copies_of_weights_do_not_pile_up(kind: str, busy: Worker, tmp_path: Path) -> None:
    results: list[Any] = []
    orders = queued(busy, tmp_path, results, kind)
    held = [one for one in orders if in_memory(one)]
    # A trial comes once: nothing else holds its weights, and it is no checkpoint.
    assert held == (orders if kind == "trial" else orders[-client.MAX_COPIES :])
    for one in set(orders) - set(held):
        assert one.weights is None
        assert one.job.weights.path is not None
    assert results == []
    assert len(busy.unfinished()) == len(orders)
    for one in held:
        one.finish(WorkerError("the end of the test"))


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    assert happened()


def test_weights_that_can_be_read_from_no_folder_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_ensure_thread", lambda _: None)  # it is busy
        worker, results = Worker(Background()), []
        orders = queued(worker, tmp_path, results, "remote")
        with worker._changed:  # a copy takes the place of the original under this lock
            wanted = [torch.load(f"/proc/self/fd/{one.weights}") for one in orders]
        until(lambda: all_in_memory(worker, orders) == [False] * 3 + [True] * 2)
        assert all(one.weights is not None for one in orders)
        assert list(tmp_path.iterdir()) == []  # the file has no name, so that nothing can stay
    worker.submit(order(tmp_path, 5, results))
    assert worker.wait("s", 120.0) == []
    assert [result.report.ok for result in results] == [True] * 6
    for number, state in enumerate(wanted):
        written = read_metadata(tmp_path / f"{number}.onnx")["weights_sha256"]
        assert written == onnxport.weights_sha256(state)
    assert [one.weights for one in orders] == [None] * 5
    worker.close()


@pytest.mark.exhaustive
def test_weights_for_which_there_is_no_room_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "_free_bytes", lambda _: 100)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_ensure_thread", lambda _: None)  # it is busy
        worker, results = Worker(Background()), []
        orders = queued(worker, tmp_path, results, "remote")
        until(lambda: all(one.problem for one in orders[:3]))
    worker.submit(order(tmp_path, 5, results))
    assert worker.wait("s", 120.0) == []
    lost, made = results[:3], results[3:]
    assert all("more than half of what is free" in str(result) for result in lost)
    assert all("Save less often" in str(result) for result in lost)
    assert [result.report.ok for result in made] == [True] * 3
    worker.close()


def test_an_order_that_is_dropped_while_it_is_put_aside_leaves_nothing(
    busy: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, copies = threading.Event(), threading.Event(), []

    def slowly(weights: int, folder: Path) -> int:
        begun.set()
        assert go_on.wait(60)
        copies.append(aside.put_aside(weights, folder))
        return copies[-1]

    monkeypatch.setattr(client, "put_aside", slowly)
    results: list[Any] = []
    orders = queued(busy, tmp_path, results, "remote")
    assert begun.wait(60)
    for one in orders:
        busy.forget(one.job.path)
    go_on.set()
    until(lambda: len(copies) == 1 and not busy._disk.locked())
    until(lambda: not Path(f"/proc/self/fd/{copies[0]}").exists())
    assert [one.weights for one in orders] == [None] * 5
    assert results == []


def test_a_worker_starts_where_the_current_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    process = WorkerProcess(Background(), [])
    try:
        assert Path(f"/proc/{process.pid}/cwd").resolve() == Path("/")
        assert Path(f"/proc/{process.pid}").exists()
    finally:
        process.kill()


@pytest.mark.exhaustive
def test_deaths_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    worker, results = Worker(Background()), []
    worker._deaths = client.MAX_DEATHS
    worker.open("s")
    worker.submit(order(tmp_path, 0, results))
    assert worker.wait("s", 120.0) == []
    assert [result.report.ok for result in results] == [True]
    worker.close()


class Mortal(Net):
    """Ends the worker the first time that it is traced in it, if the file says so.

    Args:
        ends: A file; its line for each worker process, in order, says ``0`` or ``1``.
    """

    def __init__(self, ends: Path) -> None:
        super().__init__()
        self.ends, self.met = str(ends), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if in_worker() and torch.jit.is_tracing() and not self.met:
            self.met = True
            now, *later = Path(self.ends).read_text().split() or ["0"]
            Path(self.ends).write_text("\n".join(later))
            if now == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class WaitsForModels(Callback):
    """Trains on once there are reports of both models of a checkpoint: none is dropped.

    Args:
        export: Makes them.
        ends: After the first checkpoint, the idle worker is ended.
    """

    def __init__(self, export: OnnxExport, *, ends: bool) -> None:
        self.export, self.ends, self.ended = export, ends, 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        end = time.monotonic() + 60.0
        saved = trainer.global_step // EVERY * 2
        while len(self.export.reports) < saved and time.monotonic() < end:
            time.sleep(0.02)
        if self.ends and trainer.global_step == EVERY and not self.ended:
            for worker in workers_of():
                os.kill(worker, signal.SIGKILL)
                self.ended += 1


def trained(tmp_path: Path, ends: str, *, idle_too: bool = False) -> Any:
    file = tmp_path / "ends"
    file.write_text(ends)
    background = Background(drain_s=120.0)
    export = OnnxExport(core="trace", mlflow=False, background=background, preflight=False)
    waits = WaitsForModels(export, ends=idle_too)
    run = train(tmp_path / "c", export, waits, steps=8, make=partial(Mortal, file))
    assert run.error is None
    assert file.read_text() == ""
    assert waits.ended == idle_too
    return run


@pytest.mark.exhaustive
def test_a_core_that_has_made_a_model_is_not_given_up_when_the_worker_dies(tmp_path: Path) -> None:
    run = trained(tmp_path, "0 1", idle_too=True)
    assert [report.error for report in run.reports if not report.ok] == []


@pytest.mark.exhaustive
def test_what_was_not_tried_any_more_is_named(tmp_path: Path) -> None:
    run = trained(tmp_path, "1 1")
    assert {report.code for report in run.reports} == {"OX600"}
    for report in run.reports:
        assert "The worker process has ended in trace, which was not tried again" in report.error
