"""Small files that are written in one step, and what tells one file from another."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import onnx
import pytest
import torch

from onnxport._files import MOST_BYTES, Ticket, ending_of, read_small, replace_content, sweep_begun
from onnxport.exporter.ownership import is_our_report, is_ours
from onnxport.pipeline.report_files import read_report
from onnxport.report import ExportReport

if TYPE_CHECKING:
    from pathlib import Path


def test_content_is_replaced_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / ".a.onnx.pending"
    replace_content(path, b"old")
    replace_content(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_content(tmp_path / "nowhere" / ".a.onnx.pending", b"new")


def test_what_a_killed_process_has_begun_is_swept_and_what_another_writes_is_not(
    tmp_path: Path,
) -> None:
    left, busy, other = (
        tmp_path / f"{name}.tmp"
        for name in (".a.onnx.pending", ".b.onnx.tracking", "of somebody else")
    )
    page = tmp_path / ".onnxport.html.tmp"
    for file in (left, busy, other, page):
        file.write_bytes(b"half")
    script = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(busy)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        sweep_begun(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {busy.name, other.name}
        process.communicate(b"")
    sweep_begun(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_a_ticket_is_void_once_its_file_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "note"
    assert Ticket.of(path) is None
    replace_content(path, b"one")
    ticket = Ticket.of(path)
    assert ticket is not None
    assert ticket.is_valid()
    replace_content(path, b"two")
    assert not ticket.is_valid()
    again = Ticket.of(path)
    path.unlink()
    assert again is not None
    assert not again.is_valid()


def test_how_a_checkpoint_ends_tells_other_weights(tmp_path: Path) -> None:
    first, same, other = (tmp_path / name for name in ("a.ckpt", "b.ckpt", "c.ckpt"))
    state = {"w": torch.zeros(300_000), "v": torch.zeros(3)}
    torch.save({"state_dict": state}, first)
    same.write_bytes(first.read_bytes())
    state["w"][7] = 1e-30
    torch.save({"state_dict": state}, other)
    assert first.stat().st_size == other.stat().st_size
    assert ending_of(first) == ending_of(same) != ending_of(other)
    assert ending_of(tmp_path) == ending_of(tmp_path / "nowhere") == ""


def test_files_that_are_larger_than_any_of_ours_are_not_read(tmp_path: Path) -> None:
    report = tmp_path / "a.onnx.json"
    report.write_text(ExportReport(ok=False, error="why").to_json())
    assert is_our_report(report)
    with report.open("ab") as file:
        file.write(b" " * MOST_BYTES)
    assert not is_our_report(report)
    assert read_report(tmp_path / "a.onnx") is None
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_small(report)


@pytest.mark.parametrize("field", [b"\x08\x07", b"\x72\x00"], ids=["numbers", "metadata"])
def test_fields_without_end_are_no_model(field: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    own = onnx.StringStringEntryProto(key="onnxport.version", value="1").SerializeToString()
    ours = b"\x72" + bytes([len(own)]) + own
    path.write_bytes(field * 1000 + ours)
    assert is_ours(path)
    path.write_bytes(field * 200_000 + ours)
    assert not is_ours(path)
