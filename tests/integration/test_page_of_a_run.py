"""The page that a run draws by itself: beside the checkpoints, and in the tracking server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from mlflow import MlflowClient

from onnxport import Background, MLflow, OnnxExport
from onnxport.callbacks import page as pages
from onnxport.page.history import read

if TYPE_CHECKING:
    import lightning.pytorch as pl

pytestmark = pytest.mark.integration


def fit(root: Path, epochs: int = 2, keeps: Any = None, **options: Any) -> OnnxExport:
    settings = {"core": "trace", "background": False, "mlflow": False, "page": True} | options
    export = OnnxExport(**settings)
    trainer: pl.Trainer = zoo.trainer(
        root, export, zoo.checkpoints(root, **(keeps or {})), epochs=epochs
    )
    torch.manual_seed(0)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    return export


def lines(root: Path) -> list[dict[str, Any]]:
    text = (root / "onnxport.jsonl").read_text().splitlines()
    return [json.loads(line) for line in text]


@pytest.mark.worker
@pytest.mark.parametrize("background", [False, Background()])
def test_a_run_leaves_its_page_beside_its_checkpoints(
    tmp_path: Path, background: bool | Background
) -> None:
    export = fit(tmp_path, keeps={"save_top_k": 1}, background=background)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["checkpoints", "onnxport.html", "onnxport.jsonl"]
    page = (tmp_path / "onnxport.html").read_text()
    for report in export.reports:  # the first one was removed with its checkpoint
        assert Path(str(report.checkpoint)).stem in page
    events, junk = read(tmp_path / "onnxport.jsonl")
    assert junk == 0
    assert [event.report for event in events] == export.reports


def test_a_new_run_in_the_same_folder_begins_anew_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    assert len(lines(tmp_path)) == 1
    fit(tmp_path, epochs=1)
    assert len(lines(tmp_path)) == 1
    [checkpoint, *_] = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    export = OnnxExport(core="trace", background=False, mlflow=False, page=True)
    trainer = zoo.trainer(tmp_path, export, zoo.checkpoints(tmp_path), epochs=2)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), ckpt_path=checkpoint)
    assert len(lines(tmp_path)) == 2


def test_the_server_shows_the_page_of_the_run(store: str, tmp_path: Path) -> None:
    export = fit(tmp_path, mlflow=MLflow(tracking_uri=store, register="zoo"))
    [*_, last] = export.reports
    assert last.tracking is not None
    client = MlflowClient(store)
    names = [file.path for file in client.list_artifacts(str(last.tracking.run_id))]
    assert "onnxport.html" in names
    there = client.download_artifacts(str(last.tracking.run_id), "onnxport.html", str(tmp_path))
    assert "champion" in Path(there).read_text()
    # A server was told after the model was made.
    assert [line["report"]["tracking"] is not None for line in lines(tmp_path)] == [
        False,
        True,
        False,
        True,
    ]


def test_nothing_is_drawn_where_nobody_wants_it(tmp_path: Path) -> None:
    fit(tmp_path / "no", page=False)
    assert [path.name for path in (tmp_path / "no").iterdir()] == ["checkpoints"]
    fit(tmp_path / "default", page=None)  # as the environment of the tests says
    assert [path.name for path in (tmp_path / "default").iterdir()] == ["checkpoints"]


def test_without_what_draws_there_is_a_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "is_available", lambda name: name != "plotly")
    fit(tmp_path)
    assert len(lines(tmp_path)) == 2
    assert not (tmp_path / "onnxport.html").exists()


def test_a_folder_that_takes_nothing_costs_no_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "onnxport.jsonl").mkdir()
    export = fit(tmp_path)
    assert all(report.ok for report in export.reports)
    said = [text for text in caplog.messages if "history of this run cannot be written" in text]
    assert len(said) == 1


def test_a_page_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nif 'onnxport.page' in ' '.join(sys.orig_argv): time.sleep(600)\n"
    )
    from onnxport.callbacks import announced

    monkeypatch.setattr(announced, "PAGE_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    root = tmp_path / "run"
    export = fit(root)
    assert all(report.ok for report in export.reports)
    assert not (root / "onnxport.html").exists()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        assert "onnxport.page" not in Path(f"/proc/{child}/cmdline").read_text()


def test_training_is_what_it_is_without(tmp_path: Path) -> None:
    runs = []
    for page in (False, True):
        fit(tmp_path / str(page), page=page)
        runs.append(torch.rand(4).tolist())
    assert runs[0] == runs[1]
