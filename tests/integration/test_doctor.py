"""What a machine has, what of it really runs, and what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from servers import free_port

from onnxport.doctor import Finding, diagnose

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.integration


def by_name(findings: list[Finding]) -> Mapping[str, Finding]:
    return {finding.what: finding for finding in findings}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).with_name("onnxport")), "doctor", *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_a_machine_on_which_all_is_well(tmp_path: Path, store: str) -> None:
    findings = diagnose(tmp_path, tracking_uri=store)
    assert [finding for finding in findings if not finding.ok] == []
    found = by_name(findings)
    assert "CPUExecutionProvider" in found["ONNX Runtime"].found
    assert "onnxport " in found["versions"].found
    assert found["worker"].found.startswith("starts in ")
    assert found["MLflow"].found.endswith("answers")
    assert list(tmp_path.iterdir()) == [tmp_path / "mlflow.db"]


def test_each_thing_that_is_wrong_is_said_and_the_rest_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    (tmp_path / "file").touch()
    findings = by_name(diagnose(tmp_path / "file" / "nowhere", tracking_uri=uri))
    wrong = {name for name, finding in findings.items() if not finding.ok}
    assert wrong == {"worker", "disk", "MLflow"}
    assert findings["disk"].found.endswith("file is a file")
    assert "/nowhere/python" in findings["worker"].found
    assert "onnxport sync" in findings["MLflow"].advice
    assert "secret" not in str(findings)
    assert findings["cores"].ok


def test_a_folder_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxport import doctor

    class Usage:
        free = 10**6

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    disk = by_name(diagnose(tmp_path))["disk"]
    assert not disk.ok
    assert disk.found.startswith("1 MiB are free")
    assert "dirpath=" in disk.advice


@pytest.mark.slow
def test_the_command_says_the_same_in_words_and_as_json(tmp_path: Path) -> None:
    well = command("--folder", str(tmp_path))
    assert well.returncode == 0, well.stdout + well.stderr
    assert "ok    ONNX Runtime: " in well.stdout
    closed = f"http://127.0.0.1:{free_port()}"
    ill = command("--folder", str(tmp_path), "--tracking-uri", closed, "--json")
    assert ill.returncode == 1
    content: list[dict[str, Any]] = json.loads(ill.stdout)
    assert [each["what"] for each in content if not each["ok"]] == ["MLflow"]


def test_what_is_not_there_yet_is_not_wrong_and_is_not_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    findings = by_name(diagnose(tmp_path / "runs" / "deep", tracking_uri=uri))
    assert [finding for finding in findings.values() if not finding.ok or finding.advice] == []
    assert findings["disk"].found.endswith("deep will be made by training")
    assert findings["MLflow"].found.endswith("mlflow.db is not there yet; the first run makes it")
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_nobody_can_ask_is_not_said_to_answer(tmp_path: Path) -> None:
    assert "was not asked" in by_name(diagnose(tmp_path, tracking_uri="foo://bar"))["MLflow"].found


def test_a_folder_that_refuses_files_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxport import doctor

    def refuse(_: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_write_in", refuse)
    writing = by_name(diagnose(tmp_path))["writing"]
    assert (writing.ok, writing.found) == (False, f"{tmp_path}: Permission denied")


def test_a_database_that_cannot_be_made_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    uri = f"sqlite:///{tmp_path}/file/new/mlflow.db"
    server = by_name(diagnose(tmp_path, tracking_uri=uri))["MLflow"]
    assert not server.ok
    assert "file is a file" in server.found
