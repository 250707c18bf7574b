"""The tutorial, from its first block to the answer of the served champion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pages import DOCS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.worker
@pytest.mark.timeout(1800)
def test_the_tutorial_does_what_it_shows(tmp_path: Path) -> None:
    tests = DOCS.parent / "tests"
    path = os.pathsep.join([str(tests.parent / "src"), str(tests)])
    subprocess.run(
        [sys.executable, tests / "pages.py", "results.json", "pages", DOCS / "tutorial.md"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    (outcome,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert outcome["error"] == ""
