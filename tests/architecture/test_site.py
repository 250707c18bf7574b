"""The site builds without a warning, needs nothing from elsewhere, and leaves no name out."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING

import pytest
from pages import DOCS

import onnxport
from onnxport import config, doctor, errors, report, tracking
from onnxport.callbacks.lightning.callback import OnnxExport

if TYPE_CHECKING:
    from pathlib import Path

ROOT = DOCS.parent
pytest.importorskip("sphinx", reason="the group of dependencies `docs` is not installed")

REPORTS = [f"onnxport.report.{name}" for name in report.__all__]
PUBLIC = [
    *(f"onnxport.{name}" for name in onnxport.__all__),
    *(name for name in REPORTS if name.rpartition(".")[2] not in onnxport.__all__),
    *(f"onnxport.tracking.{name}" for name in tracking.__all__),
    *(f"onnxport.doctor.{name}" for name in doctor.__all__),
]
OPTIONS = [
    getattr(config, name)
    for name in config.__all__
    if dataclasses.is_dataclass(getattr(config, name))
]


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-n", "-W", "--keep-going", "-q"]
    return subprocess.run(
        [*command, "-d", str(site / "trees"), str(docs), str(site)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(DOCS, folder)
    assert done.returncode == 0, done.stderr
    return folder


def names_in(site: Path) -> set[str]:
    """Return what the inventory of a site says that it documents."""
    content = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(content).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    assert sorted(set(PUBLIC) - names_in(site)) == []


@pytest.mark.slow
def test_every_argument_of_the_callback_is_explained(site: Path) -> None:
    page = (site / "reference" / "callback.html").read_text(encoding="utf-8")
    names = inspect.signature(OnnxExport.__init__).parameters
    explained = set(re.findall(r"<strong>(\w+)</strong>", page))
    assert sorted(names.keys() - explained - {"self"}) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [each for each in OPTIONS if each.__name__ in onnxport.__all__],
    ids=lambda x: x.__name__,
)
def test_every_option_is_explained(option: type, site: Path) -> None:
    page = (site / "reference" / "options.html").read_text(encoding="utf-8")
    start = page.index(f'id="onnxport.{option.__name__}"')
    part = page[start : page.find('<dt class="sig sig-object py" id="onnxport.', start + 1)]
    explained = set(re.findall(r"<strong>(\w+)</strong>", part))
    assert sorted({field.name for field in dataclasses.fields(option)} - explained) == []


@pytest.mark.slow
def test_every_page_is_there_but_the_notes_of_the_project(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.glob("**/*.md")}
    built = {path.relative_to(site).with_suffix("") for path in site.glob("**/*.html")}
    left_out = {str(page) for page in pages - built if "_build" not in page.parts}
    assert left_out <= {"progress"}  # which is there while something is under way


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""(?:src=|rel="stylesheet"[^>]*href=|@import|url\()["']?(?:https?:)?//""")
    files = [*site.glob("**/*.html"), *site.glob("_static/**/*.css")]
    assert [file.name for file in files if loaded.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_every_drawing_says_in_words_what_it_shows(site: Path) -> None:
    page = (site / "how-it-works.html").read_text(encoding="utf-8")
    drawings = list((DOCS / "drawings").glob("*.svg"))
    assert len(re.findall(r"<svg role='img' aria-label=\"[^\"]{60,}\"", page)) == len(drawings)


@pytest.mark.slow
def test_a_broken_link_and_an_unknown_name_are_noticed(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    settings = (DOCS / "conf.py").read_text(encoding="utf-8")
    settings = settings.replace("Path(__file__).parent", f"Path({str(DOCS)!r})", 1)
    (docs / "conf.py").write_text(settings + "\nhtml_static_path = []\n", encoding="utf-8")
    (docs / "index.md").write_text(
        "# A page\n\n[gone](gone.md), [no such part](#nowhere)\n\n"
        "```{eval-rst}\n.. autofunction:: onnxport.nothing\n```\n",
        encoding="utf-8",
    )
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    for complaint in ("'gone.md'", "'nowhere'", "nothing"):
        assert complaint in done.stderr
    shutil.rmtree(docs)


def test_every_error_has_a_page_that_the_list_finds() -> None:
    assert "errors/*" in (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert {getattr(errors, name).code for name in errors.__all__} == {
        page.stem for page in (DOCS / "errors").glob("*.md")
    }
