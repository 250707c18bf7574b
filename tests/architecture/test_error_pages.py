"""Each error has a code, and each code a page; what the docs point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnxport import errors

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "errors"
CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_each_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert {path.stem for path in PAGES.glob("*.md")} == set(codes)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_its_page_says_what_to_do(kind: type[errors.OnnxportError]) -> None:
    text = (PAGES / f"{kind.code}.md").read_text()
    assert text.startswith(f"# {kind.code}: ")
    assert "**What to do.**" in text
    if kind is not errors.OnnxportError:
        assert f"`{kind.__name__}`" in text


@pytest.mark.parametrize(
    "page",
    sorted(set(ROOT.glob("docs/**/*.md")) - set(ROOT.glob("docs/_build/**"))),
    ids=lambda page: page.name,
)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [x for x in links if "://" not in x and not (page.parent / x).exists()] == []


# What the pages of errors show is run in test_pages.py.
def test_the_python_of_the_page_on_reliability_runs() -> None:
    page = PAGES.parent / "reliability.md"
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), {})  # noqa: S102 - our own page
