"""The tutorial, from its first block to the answer of the served champion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pages import DOCS, read_elsewhere

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.integration
@pytest.mark.exhaustive
@pytest.mark.worker
@pytest.mark.timeout(1800)
def test_the_tutorial_does_what_it_shows(tmp_path: Path) -> None:
    (outcome,) = read_elsewhere([DOCS / "tutorial.md"], tmp_path).values()
    assert outcome["error"] == ""
