"""The commands that the documentation shows run as they stand there, and all are documented."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onnxport.cli import _app

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
MODULE, SAME_IN_PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
CONSOLES = re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
TRAIN = """
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import Data, Net

saves = ModelCheckpoint("runs", save_top_k=-1, filename="{epoch}")
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, callbacks=[saves])
trainer.fit(Net(hidden=6), datamodule=Data())
"""
END_CODES = {"diff": 1}


def shown() -> list[tuple[str, list[str]]]:
    """Each command, and the lines that follow it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(CONSOLES).splitlines():
        if line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        else:
            found[-1][1].append(line)
    return found


@pytest.mark.exhaustive
@pytest.mark.integration
@pytest.mark.slow
def test_the_commands_of_the_page_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(MODULE)
    subprocess.run([sys.executable, "-c", TRAIN], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for command, lines in shown():
        program, name, *words = shlex.split(command)
        result = CliRunner().invoke(_app(), [name, *words])
        assert program == "onnxport"
        assert result.exit_code == END_CODES.get(name, 0), (command, result.output)
        printed = result.stdout.splitlines()
        for expected, line in zip(lines, printed, strict=False):
            if expected == "...":
                break
            known = re.escape(expected).replace(r"1\.2e\-07", r"\S+").replace(r"5\.4", r"\S+")
            assert re.fullmatch(known, line), (command, line)
        if "..." not in lines:
            assert len(printed) == len(lines), (command, printed)
    code = f"import torch\n{SAME_IN_PYTHON}\nassert all(report.ok for report in reports)"
    main = f"if __name__ == '__main__':\n    {code.replace(os.linesep, os.linesep + '    ')}"
    (tmp_path / "same.py").write_text(main)
    subprocess.run([sys.executable, "same.py"], cwd=tmp_path, check=True)


def test_each_command_is_documented() -> None:
    names = [command.name or command.callback.__name__ for command in _app().registered_commands]  # type: ignore[union-attr]
    assert [name for name in names if f"onnxport {name}" not in PAGE] == []
