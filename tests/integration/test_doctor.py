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
    findings = by_name(diagnose(tmp_path / "nowhere", tracking_uri=uri))
    wrong = {name for name, finding in findings.items() if not finding.ok}
    assert wrong == {"worker", "disk", "MLflow"}
    assert "nowhere" in findings["disk"].found
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
    assert disk.found.startswith("0.0 GiB are free")
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
