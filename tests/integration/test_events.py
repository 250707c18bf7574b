"""One line per change of state, for people and for programs."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
import zoo

from onnxport import MLflow, OnnxExport
from onnxport._events import event

pytestmark = pytest.mark.integration


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged as events."""
    caplog.set_level(logging.INFO, logger="onnxport.events")
    return caplog


def events(lines: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in lines.records if record.name == "onnxport.events"]


def test_the_life_of_each_model_is_logged(
    lines: pytest.LogCaptureFixture, tmp_path: Path, store: str
) -> None:
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True, monitor="step", mode="max")
    export = OnnxExport(core="trace", mlflow=MLflow(tracking_uri=store, register="m"))
    zoo.trainer(tmp_path, saves, export, epochs=2).fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    found = events(lines)
    counts = Counter(record.event for record in found)
    assert counts == {
        "model.begun": 4,
        "model.proven": 4,
        "server.told": 4,
        "model.withdrawn": 2,  # the first, and the first of last
        "model.removed": 1,
    }
    proven = [record.facts for record in found if record.event == "model.proven"]
    assert {Path(facts["model"]).stem for facts in proven} == {
        *("epoch=0-step=3", "epoch=1-step=6", "last"),
    }
    assert all(facts["weights"] and facts["seconds"] > 0 for facts in proven)
    assert found[0].getMessage().startswith("model.begun model=/")


def test_a_failure_is_logged_with_its_code(lines: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    export = OnnxExport(core="trace")
    saves = zoo.checkpoints(tmp_path)
    trainer = zoo.trainer(tmp_path, saves, export, epochs=1)
    trainer.fit(zoo.Classifier(zoo.PythonInside()), zoo.loader())
    (failed,) = [record for record in events(lines) if record.event == "model.failed"]
    assert failed.facts["code"] == "OX300"
    assert " code=OX300 " in failed.getMessage()


@pytest.mark.worker
def test_the_worker_is_logged(lines: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    export = OnnxExport(core="trace", mlflow=False)
    saves = zoo.checkpoints(tmp_path)
    zoo.trainer(tmp_path, saves, export, epochs=1).fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    names = [record.event for record in events(lines)]
    assert names.count("model.proven") == 1
    assert "worker.died" not in names


def test_a_name_with_line_ends_stays_in_its_line(lines: pytest.LogCaptureFixture) -> None:
    event("model.begun", model="a\nmodel.proven model=b.onnx", other=None)
    (record,) = events(lines)
    assert record.getMessage() == 'model.begun model="a\\nmodel.proven model=b.onnx"'


def test_nothing_is_logged_unless_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="onnxport.events")
    event("model.begun", model="a")
    assert events(caplog) == []
