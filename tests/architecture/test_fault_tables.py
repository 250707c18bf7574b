"""The page of what was broken on purpose says what was found, and nothing was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import registered

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
LEAST_INJECTIONS, LEAST_KINDS = 1500, 60


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks/results/faults.json").read_text())
    return content


def test_the_page_has_the_tables_of_the_results(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from faults_report import put_into, tables

    page = PAGE.read_text(encoding="utf-8")
    assert put_into(page, tables(found)) == page


def test_each_fault_is_one_of_the_catalogue_and_was_not_made_more_often(
    found: dict[str, Any],
) -> None:
    known = {f"{fault.area}: {fault.name}": fault.times for fault in registered()}
    for name, row in found["faults"].items():
        assert row["injected"] <= known[name], name
        assert row["fired"] <= row["injected"], name


def test_enough_was_tried_and_no_promise_was_broken(found: dict[str, Any]) -> None:
    rows = found["faults"]
    assert [name for name, row in rows.items() if row["problems"]] == []
    assert len(rows) >= LEAST_KINDS
    assert sum(row["injected"] for row in rows.values()) >= LEAST_INJECTIONS
