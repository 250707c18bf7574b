"""The thread beside the worker: it comes and goes, and no order is lost on the way."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from onnxport import Background
from onnxport.callbacks.runner import _copied
from onnxport.config import ExportOptions
from onnxport.report import Provenance
from onnxport.tree import Example
from onnxport.worker import client
from onnxport.worker.client import Order, Worker
from onnxport.worker.protocol import Done, SentJob, WeightsFile

if TYPE_CHECKING:
    from onnxport.errors import WorkerError

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


def test_orders_that_come_while_the_thread_leaves_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IDLE_S", 0.05)
    worker, results = Worker(Background()), []
    for number in range(6):
        worker.submit(order(tmp_path, number, results))
        assert worker.wait("s", 120.0) == []
        # Around the moment in which the thread and its process go.
        time.sleep(0.045 + 0.005 * number)
    assert [result.report.ok for result in results] == [True] * 6
    worker.close()


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


def test_a_later_order_for_the_same_file_replaces_one_that_waits(tmp_path: Path) -> None:
    worker, results = Worker(Background()), []
    for number in (0, 1, 1, 1):
        worker.submit(order(tmp_path, number, results))
    worker.forget(tmp_path / "0.onnx")
    assert worker.wait("s", 120.0) == []
    assert {result.number for result in results} == {1}
    assert len(results) <= 2  # the first may have been begun already
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


@pytest.mark.parametrize("kind", ["file", "remote", "trial"])
def test_copies_of_weights_do_not_pile_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "_ensure_thread", lambda _: None)  # it is busy
    worker, results, orders = Worker(Background()), [], []
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
    held = [one for one in orders if one.weights is not None]
    if kind == "trial":  # comes once: nothing else holds its weights, and it is no checkpoint
        assert held == orders
        assert results == []
        return
    assert held == orders[-client.MAX_COPIES :]
    assert [one.job.weights.path is not None for one in orders[:3]] == [kind == "file"] * 3
    assert len(results) == (3 if kind == "remote" else 0)
    assert all("Save less often" in str(result) for result in results)
    assert len(worker.unfinished()) == (2 if kind == "remote" else 5)
    for one in held:
        one.finish(client.WorkerError("the end of the test"))
