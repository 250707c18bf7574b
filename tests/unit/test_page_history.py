"""The history of a run: lines that are added, and read again after anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import REPORT, TOLD, at

from onnxport.errors import ConfigurationError
from onnxport.page.document import _verdict
from onnxport.page.folder import history_of
from onnxport.page.history import HISTORY, append, latest, read
from onnxport.report import ExportReport, Provenance

if TYPE_CHECKING:
    from pathlib import Path


def write_beside(folder: Path, report: ExportReport, name: str) -> None:
    (folder / name).write_bytes(b"a model")
    (folder / f"{name}.json").write_text(report.to_json())


def test_what_was_added_is_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / HISTORY
    for step in (1, 2):
        append(file, at(step), monitor="val_loss", mode="min")
    events, junk = read(file)
    assert [event.report for event in events] == [at(1), at(2)]
    assert (events[0].monitor, events[0].mode, junk) == ("val_loss", "min", 0)
    assert events[0].time is not None
    assert file.stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_event_is_one_line_of_strict_json(tmp_path: Path) -> None:
    append(tmp_path / HISTORY, at(1, metrics={"a\nb": float("nan")}))
    (line,) = (tmp_path / HISTORY).read_text().splitlines()
    assert json.loads(line)["report"]["metrics"] == {"a\nb": "nan"}


def test_a_torn_last_line_costs_no_other(tmp_path: Path) -> None:
    file = tmp_path / HISTORY
    append(file, at(1))
    append(file, at(2))
    file.write_bytes(file.read_bytes()[:-40])
    events, _ = read(file)
    assert [event.report.global_step for event in events] == [1]
    append(file, at(3))
    events, junk = read(file)
    assert [event.report.global_step for event in events] == [1, 3]
    assert junk == 1


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b'{"report": {"ok": true}}',
        b"[" * 100_000,
        b'{"report": ' + REPORT.to_json().replace('"ok": true', '"ok": "yes"').encode() + b"}",
        b'{"report": ' + REPORT.to_json().replace(": 10,", ": 1e400,").encode() + b"}",
        b'{"time": "now", "report": ' + REPORT.to_json().encode() + b"}",
        b'{"mode": "up", "report": ' + REPORT.to_json().encode() + b"}",
    ],
)
def test_junk_is_passed_over_and_counted(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / HISTORY
    append(file, at(1))
    with file.open("ab") as end:
        end.write(line.replace(b"\n", b"") + b"\n")
    append(file, at(2))
    events, junk = read(file)
    assert [event.report.global_step for event in events] == [1, 2]
    assert junk == 1


@given(st.binary(max_size=200))
def test_no_bytes_end_a_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("junk") / HISTORY
    file.write_bytes(content)
    assert read(file)[0] == ()


def test_a_later_line_of_the_same_checkpoint_takes_its_place(tmp_path: Path) -> None:
    file = tmp_path / HISTORY
    for report in (at(1), at(2), at(1, tracking=TOLD), at(1, weights_sha256="cd")):
        append(file, report)
    found = [event.report for event in latest(read(file)[0])]
    assert found == [at(1, tracking=TOLD), at(2), at(1, weights_sha256="cd")]


def test_a_failure_that_was_made_good_is_none(tmp_path: Path) -> None:
    file = tmp_path / HISTORY
    made = at(1)
    origin = Provenance(checkpoint=made.checkpoint, global_step=1)
    append(file, ExportReport.of_failure("The worker died.", origin))
    append(file, ExportReport.of_failure("No checkpoint.", Provenance()))
    append(file, made)
    assert [event.report.ok for event in latest(read(file)[0])] == [False, True]


def test_nothing_is_added_to_what_is_no_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / HISTORY).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match=HISTORY):
        append(tmp_path / HISTORY, REPORT)
    assert (tmp_path / "other").read_text() == "kept"


def test_reports_beside_models_complete_a_history(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    append(run / HISTORY, at(1, seconds={"total": 2.0}))
    write_beside(run, at(1, tracking=TOLD), "1.onnx")
    write_beside(run, at(2), "2.onnx")
    (run / "3.onnx.json").write_text("{}")
    found = history_of(tmp_path)
    assert [(each.global_step, each.tracking) for each in found.reports] == [(1, TOLD), (2, None)]
    assert found.reports[0].seconds == {"total": 2.0}
    assert found.unreadable == 1
    assert found.model == run / "1.onnx"  # the champion
    assert set(found.files or ()) == {"/runs/1.onnx", "/runs/2.onnx"}


def test_checkpoints_are_in_the_order_of_training_not_of_their_reports(tmp_path: Path) -> None:
    for step in (10, 30, 20):
        append(tmp_path / HISTORY, at(step))
    write_beside(tmp_path, at(15), "15.onnx")
    assert [each.global_step for each in history_of(tmp_path).reports] == [10, 15, 20, 30]


def test_the_newest_run_of_a_folder_is_shown(tmp_path: Path) -> None:
    for name, step, when in (("old", 1, 1000), ("new", 2, 2000)):
        (tmp_path / name).mkdir()
        append(tmp_path / name / HISTORY, at(step))
        write_beside(tmp_path / name, at(step + 10), f"{step + 10}.onnx")
        os.utime(tmp_path / name / HISTORY, (when, when))
    found = history_of(tmp_path)
    assert [each.global_step for each in found.reports] == [2, 12]
    assert found.others == (f"old/{HISTORY}",)


def test_a_report_cannot_have_files_of_other_folders_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.onnx").write_bytes(b"")
    append(run / HISTORY, at(1, path=str(tmp_path / "secret.onnx")))
    append(run / HISTORY, at(2, path="\0"))
    found = history_of(run)
    assert (found.model, found.files) == (None, {})


def test_a_folder_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No reports of onnxport were found in"):
        history_of(tmp_path)


def test_adding_an_event_imports_nothing_heavy() -> None:
    heavy = ("plotly", "jinja2", "onnx", "numpy", "torch", "onnxport.page.document")
    code = f"import sys, onnxport.page.history\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_page_without_a_model_imports_neither_torch_nor_onnx(tmp_path: Path) -> None:
    append(tmp_path / HISTORY, REPORT)
    code = (
        "import sys; sys.argv[1:] = [sys.argv[1]]\nfrom onnxport.page.__main__ import main\n"
        "print(main(), [m for m in ('torch', 'onnx', 'lightning') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"
    assert (tmp_path / "onnxport.html").is_file()


def test_models_that_are_owed_are_counted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / ".model.onnx.pending").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="1 are owed, and `onnxport resume`"):
        history_of(tmp_path)
    append(tmp_path / HISTORY, REPORT)
    found = history_of(tmp_path)
    assert found.owed == 1
    assert "1 model more to be made." in _verdict(found)
