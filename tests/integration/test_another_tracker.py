"""A tracker is three methods: here is a second one, which no other code knows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import onnxport
from onnxport import TrackingRecord
from onnxport.report import Provenance
from onnxport.tracking.base import Model, RunAddress, Tracker
from onnxport.tracking.courier import Courier
from onnxport.tracking.job import Job, job_path, save_job

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.integration


class FolderTracker:
    """Keeps models in a folder."""

    def __init__(self, address: RunAddress) -> None:
        self._folder = Path(address.uri)

    def publish(self, model: Model, *, last: bool) -> TrackingRecord:
        model.require_unchanged()
        shutil.copyfile(model.path, self._folder / f"{model.place}.onnx")
        if last:
            (self._folder / "best").write_text(model.place)
        return TrackingRecord(uri=str(self._folder), model_id=model.place)

    def remove(self, place: str) -> None:
        (self._folder / f"{place}.onnx").unlink(missing_ok=True)

    def attach(self, file: Path) -> None:
        shutil.copyfile(file, self._folder / file.name)

    def close(self, status: str) -> None:
        (self._folder / "ended").write_text(status)


def test_jobs_are_carried_out_by_any_tracker(tmp_path: Path) -> None:
    make: Callable[[RunAddress], Tracker] = FolderTracker
    courier, path = Courier(make), tmp_path / "model.onnx"
    report = onnxport.export(nn.Linear(6, 2), torch.randn(3, 6), path, core="trace")
    model = Model.of_file(path, report, Provenance())
    assert model is not None
    address = RunAddress(uri=str(tmp_path / "kept"))

    def job(content: Model | None, **how: object) -> Job:
        return Job(model=path, place=model.place, address=address, content=content, **how)

    note = save_job(job(model, last=True, ended="FINISHED"))
    carried = courier.carry_out(note)  # the folder is not there yet
    assert (carried.left, carried.down) == (True, False)  # a folder, which is no server
    assert note.exists()
    (tmp_path / "kept").mkdir()
    carried = courier.carry_out(note)
    assert carried.record == TrackingRecord(uri=str(tmp_path / "kept"), model_id=model.place)
    assert not note.exists()
    kept = {file.name for file in (tmp_path / "kept").iterdir()}
    assert kept == {f"{model.place}.onnx", "best", "ended"}
    page = tmp_path / "page.html"
    page.write_text("what became of it")
    attached = Job(model=page, place=model.place, address=address, attached=True)
    assert not courier.carry_out(save_job(attached)).left
    assert (tmp_path / "kept" / "page.html").read_text() == "what became of it"
    save_job(job(None))
    assert courier.carry_out(job_path(path)).record is None
    assert not (tmp_path / "kept" / f"{model.place}.onnx").exists()
