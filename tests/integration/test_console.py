"""What a run says on the console: a word per model meanwhile, a table when it is over."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from onnxport import OnnxExport
from onnxport.callbacks.summary import MOST_ROWS, show, status_of, table_of
from onnxport.report import ExportReport, TrackingRecord

if TYPE_CHECKING:
    import lightning.pytorch as pl

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

FIT = """
import sys
import lightning.pytorch as pl
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from onnxport import OnnxExport

if __name__ == "__main__":
    callbacks = [ModelCheckpoint("runs", save_top_k=-1), OnnxExport(core="trace")]
    bar = [RichProgressBar()] if "rich" in sys.argv else []
    options = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=3, callbacks=[*callbacks, *bar], **options)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
"""


class Bar(TQDMProgressBar):
    """Keeps what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []

    def get_metrics(self, *args: Any) -> Any:
        return {**super().get_metrics(*args), "mine": "1"}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.shown.append(str(self.get_metrics(trainer, pl_module).get("onnx", "")))


def fit(root: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> OnnxExport:
    export = OnnxExport(core="trace", mlflow=False, **options)
    saves = zoo.checkpoints(root)
    trainer = zoo.trainer(root, saves, export, *callbacks, epochs=epochs, enable_progress_bar=True)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    return export


def test_the_progress_bar_shows_the_last_model(tmp_path: Path) -> None:
    bar = Bar()
    export = fit(tmp_path, bar)
    assert bar.shown[0] == ""
    assert bar.shown[-1] == status_of(export.reports[0])
    assert bar.shown[-1].startswith("step 3 proven ")
    # Training is over, and the bar is the user's own again.
    assert set(vars(bar)) & {"get_metrics", "_onnxport_status"} == set()
    assert "onnx" not in bar.get_metrics(bar.trainer, bar.trainer.lightning_module)


def test_what_the_bar_itself_calls_onnx_stays(tmp_path: Path) -> None:
    class Own(Bar):
        def get_metrics(self, *args: Any) -> Any:
            return {**super().get_metrics(*args), "onnx": "of the user"}

    bar = Own()
    fit(tmp_path, bar)
    assert set(bar.shown) == {"of the user"}


def test_a_table_says_what_became_of_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(tmp_path)
    (text,) = [text for text in caplog.messages if "checkpoints have a proven model" in text]
    title, head, *rows = text.splitlines()
    assert title == "onnxport: 2 of 2 checkpoints have a proven model"
    assert head.split()[:4] == ["checkpoint", "step", "model", "max"]
    assert [row.split()[:2] for row in rows] == [
        ["epoch=0-step=3.ckpt", "3"],
        ["epoch=1-step=6.ckpt", "6"],
    ]


def test_it_is_quiet_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bar = Bar()
    export = fit(tmp_path, bar, console=False)
    assert [report.ok for report in export.reports] == [True, True]
    assert [text for text in caplog.messages if text.startswith("onnxport")] == []
    assert set(bar.shown) == {""}


def test_the_table_comes_after_ctrl_c_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupts(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    caplog.set_level("INFO")
    with pytest.raises(SystemExit):
        fit(tmp_path, Interrupts())
    assert any("1 of 1 checkpoints have a proven model" in text for text in caplog.messages)


def test_what_somebody_has_put_on_the_bar_stays(tmp_path: Path) -> None:
    bar = Bar()
    own = bar.get_metrics
    vars(bar)["get_metrics"] = own
    fit(tmp_path, bar)
    assert vars(bar)["get_metrics"] is own
    assert bar.shown[-1].startswith("step 3 proven ")


def test_a_failure_is_in_the_table() -> None:
    failed = ExportReport(
        ok=False, checkpoint="a/last.ckpt", error="No.\nBecause " + "x" * 99, code="OX300"
    )
    (row,) = table_of([failed])
    assert row[0] == "last.ckpt"
    assert row[2].startswith("none [OX300]: No. Because xxx")
    assert row[2].endswith("...")
    assert status_of(failed) == "final weights failed [OX300]"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (None, ""),
        (TrackingRecord(uri="x", missing="it is down"), "not told yet"),
        (TrackingRecord(uri="x", model_id="m"), "logged"),
        (TrackingRecord(uri="x", version=3), "v3"),
        (TrackingRecord(uri="x", version=3, alias="champion"), "v3 champion"),
    ],
)
def test_the_registry_is_in_the_table(record: TrackingRecord | None, text: str) -> None:
    (row,) = table_of([ExportReport(ok=True, core="trace", tracking=record)])
    assert row[-1] == text


def test_checkpoints_that_went_before_their_turn_are_counted() -> None:
    said: list[str] = []
    show([ExportReport(ok=True, core="trace", global_step=3)], said.append, dropped=2)
    assert "1 of 1 checkpoints have a proven model; 2 went" in said[0]
    show([], said.append, dropped=2)
    assert "no model: of the checkpoints 2 went" in said[1]


def test_a_long_run_has_a_short_table() -> None:
    said: list[str] = []
    show([ExportReport(ok=True, core="trace", global_step=step) for step in range(99)], said.append)
    (text,) = said
    assert "99 of 99 checkpoints" in text
    assert f"(the last {MOST_ROWS})" in text
    assert len(text.splitlines()) == 2 + MOST_ROWS
    show([], said.append)
    assert len(said) == 1


@pytest.mark.parametrize("bar", ["", "rich"])
def test_a_terminal_gets_a_drawn_table(bar: str, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", FIT, bar],
        cwd=tmp_path,
        env=environment | {"COLUMNS": "140", "TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    printed = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            printed += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0, printed.decode()
    text = printed.decode()
    assert "onnx" in text
    assert "3 of 3 checkpoints have a proven model" in text
    assert "┃" in text


class Impossible(torch.nn.Module):
    """Has an operator without an ONNX form."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eig(image[:, 0, :3, :3])[0].real


def test_what_the_trial_has_said_is_not_said_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = zoo.Classifier(torch.nn.Sequential(Impossible(), torch.nn.Linear(3, 3)))
    export = OnnxExport(core="trace", background=False, preflight=True, mlflow=False)
    zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), export, epochs=2).fit(module, zoo.loader())
    marks = ("The module does not export", "No ONNX model")
    said = [text for text in caplog.messages if text.startswith(marks)]
    assert len(said) == 3
    assert said[0].startswith("The module does not export [OX300]")
    assert all(text.endswith("as for the trial. Training goes on.") for text in said[1:])
    assert not any("No core produced" in row[2] for row in table_of(export.reports))
    assert "To repeat it: " in said[0]
