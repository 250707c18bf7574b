"""The page of a real run in a real browser: drawn, quiet, and usable by everybody.

Needs Chromium on the PATH; without it these tests are skipped, unless
``ONNXPORT_REQUIRE_BROWSER=1``.
"""

from __future__ import annotations

import os
import shutil
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright
from real_run import trained, write_history
from reports import at, measured

from onnxport.page.document import render, write_page
from onnxport.page.folder import history_of
from onnxport.page.history import Event
from onnxport.page.run import RunHistory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),  # a browser among other tests gets little of a small machine
]

AXE = files("axe_playwright_python") / "axe.min.js"
DRAWN = "html[data-charts=drawn]"


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a real run, with what a callback may measure besides."""
    folder = tmp_path_factory.mktemp("runs") / "glyphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXPORT_BACKGROUND", "0")
        patch.setenv("ONNXPORT_CACHE_DIR", str(folder.parent))
        reports = trained(folder, epochs=3, layers=1)
    assert all(report.ok for report in reports), reports
    write_history(folder, measured(reports))
    write_page(history_of(folder), folder / "onnxport.html")
    return folder / "onnxport.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        assert not os.environ.get("ONNXPORT_REQUIRE_BROWSER"), "there is no Chromium on the PATH"
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """Open pages; whatever one says to the console, or asks a network for, is a failure."""
    said: list[str] = []
    contexts = []

    def open_page(path: Path, **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda asked: said.append(asked.url))
        page.goto(path.as_uri())
        assert said.pop() == path.as_uri()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def violations(page: Page) -> list[str]:
    """What axe-core finds."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


def is_too_wide(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_drawn_accessible_and_as_wide_as_the_screen(
    run_page: Path, opened: Any, width: int
) -> None:
    page = opened(run_page, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page.wait_for_selector(DRAWN)
    charts = page.query_selector_all(".chart")
    assert len(charts) >= 6
    for chart in charts:
        marks = chart.query_selector_all("svg .point, svg .box, svg .bars path")
        assert marks, chart.get_attribute("id")
        assert chart.get_attribute("aria-label")
    assert not is_too_wide(page)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert not is_too_wide(page)
    for theme in ("dark", "light"):
        page.emulate_media(color_scheme=theme)
        assert violations(page) == []


def test_boxes_numbers_and_the_theme_are_for_the_keyboard_too(run_page: Path, opened: Any) -> None:
    page = opened(run_page, color_scheme="light", viewport={"width": 1280, "height": 800})
    page.wait_for_selector(DRAWN)
    for selector in ("details.numbers", "details.box details.box:not([open])"):
        part = page.query_selector(selector)
        part.query_selector("summary").focus()
        page.keyboard.press("Enter")
        assert part.get_attribute("open") == ""
        page.keyboard.press("Space")
        assert part.get_attribute("open") is None
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


def test_the_graph_shows_the_modules_of_the_run(run_page: Path, opened: Any) -> None:
    page = opened(run_page)
    text = page.inner_text("#graph")
    for part in ("Glyphs", "embed", "TransformerEncoderLayer", "in: rows", "out: logits"):
        assert part in text


def test_without_scripts_the_numbers_are_there(run_page: Path, opened: Any) -> None:
    page = opened(run_page, java_script_enabled=False)
    assert page.locator("noscript").is_visible()
    page.locator("details.numbers > summary").first.click()
    assert page.locator("details.numbers table").first.is_visible()


def test_a_hostile_report_runs_nothing_in_a_browser(tmp_path: Path, opened: Any) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    reports = measured([at(i, metrics={evil: 0.5, "val_acc": i, "val_loss": 1}) for i in range(3)])
    page = tmp_path / "evil.html"
    page.write_text(render(RunHistory(events=tuple(Event(report=r) for r in reports), name=evil)))
    opened(page).wait_for_selector(DRAWN)
