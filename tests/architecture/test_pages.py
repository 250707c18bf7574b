"""What the documentation shows runs as it stands, page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pages import DOCS, blocks_of, matches, read_elsewhere

if TYPE_CHECKING:
    from pathlib import Path

SLOW = {"server-down", "several-processes"}
"""They start servers and processes: a minute and more."""
NAMED = (
    "index",
    "how-it-works",
    "guarantees",
    "comparison",
    "troubleshooting",
    "contributing",
    "adapters",
)
"""Other pages in depth have tests of their own, or show parts of programs."""
PAGES = [
    *(DOCS / f"{name}.md" for name in NAMED),
    *sorted(
        page
        for folder in ("how-to", "frameworks", "errors", "reference")
        for page in (DOCS / folder).glob("*.md")
    ),
]
QUICK = [page for page in PAGES if page.stem not in SLOW and blocks_of(page)]

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    # Models are made in the process that reads the pages: each start of a worker takes seconds.
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXPORT_BACKGROUND", "0")
        patch.setenv("ONNXPORT_PAGE", "0")
        patch.setenv("ONNXPORT_CACHE_DIR", str(folder / "memory"))
        return read_elsewhere(QUICK, folder)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", QUICK, ids=lambda page: page.stem)
def test_what_a_page_shows_happens(page: Path, outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes[str(page)]["error"] == ""


@pytest.mark.exhaustive
@pytest.mark.worker
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(SLOW))
def test_what_a_slow_page_shows_happens(name: str, tmp_path: Path) -> None:
    (outcome,) = read_elsewhere([DOCS / "how-to" / f"{name}.md"], tmp_path).values()
    assert outcome["error"] == ""


def test_a_page_that_shows_something_else_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text(
        "```python\nprint(6 * 7)\n```\n\n```text\n41\n```\n\n```yaml\na: 1\n```\n", encoding="utf-8"
    )
    (outcome,) = read_elsewhere([page], tmp_path).values()
    assert "nobody runs a block of 'yaml'" in outcome["error"]
    (tmp_path / "again").mkdir()
    page.write_text("```python\nprint(6 * 7)\n```\n\n```text\n41\n```\n", encoding="utf-8")
    (outcome,) = read_elsewhere([page], tmp_path / "again").values()
    assert "the page shows\n41" in outcome["error"]
    assert "printed is\n42" in outcome["error"]


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a\nb", "a\nb\n", True),
        ("b", "a\nb\n", True),
        ("a", "a\nb\n", False),
        ("a\n...\nc", "a\nb\nb\nc", True),
        ("a ... c", "a b c", True),
        ("a ... c", "a b\nc", False),
        ("a.c", "abc", False),
    ],
)
def test_what_is_shown_is_compared_with_the_end_of_what_is_printed(
    expected: str, printed: str, same: bool
) -> None:
    assert matches(expected, printed) == same
