"""Imports go one way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")
UPSIDE_DOWN = """
[importlinter]
root_package = onnxport

[importlinter:contract:layers]
name = errors know everything
type = layers
layers =
    onnxport.errors
    onnxport.config
"""


def lint(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT, "--no-cache", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_import_contract_is_kept() -> None:
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_a_broken_contract_is_noticed(tmp_path: Path) -> None:
    config = tmp_path / "upside_down.ini"
    config.write_text(UPSIDE_DOWN, encoding="utf-8")
    done = lint("--config", str(config))
    assert done.returncode == 1
    assert "errors know everything BROKEN" in done.stdout
