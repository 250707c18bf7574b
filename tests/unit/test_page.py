"""The page of a run as text: nothing in a report is markup, and nothing is left out silently."""

from __future__ import annotations

import json
import re
import time
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import onnx
import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import REPORT, TOLD, at, measured
from typer.testing import CliRunner
from typing_extensions import override

from onnxport.cli import _app
from onnxport.errors import OnnxportError, PublishError
from onnxport.page.boxes import view_of
from onnxport.page.document import render, sections_of, write_page
from onnxport.page.history import HISTORY, Event, append
from onnxport.page.modules import boxes_of
from onnxport.page.run import RunHistory
from onnxport.page.troubles import ADVICE
from onnxport.report import ExportReport, OutputError
from onnxport.signature import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WITH_VAL = {"metrics": {"val_acc": 0.5, "val_loss": 1.5}}
SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
CHECKS = (REPORT.checks[0], replace(REPORT.checks[0], sizes={"batch": 7}))
SECONDS = {"prove": 0.1, "total": 0.3}
FULL = measured(
    [
        at(step, inputs=(SPEC,), outputs=(SPEC,), checks=CHECKS, seconds=SECONDS, **WITH_VAL)
        for step in (1, 2, 3)
    ]
)


def run_of(*reports: ExportReport, **options: Any) -> RunHistory:
    """A run of reports."""
    events = tuple(Event(report=each, time=1.7e9, monitor="val_acc") for each in reports)
    return RunHistory(events=events, **options)


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


def seen(page: str) -> Tags:
    found = Tags()
    found.feed(page)
    return found


def with_text(value: Any, text: str) -> Any:
    """The same value with another text in every place that can hold any."""
    if isinstance(value, str):
        return text
    if isinstance(value, tuple):
        return tuple(with_text(each, text) for each in value)
    if isinstance(value, dict):
        return {f"{text}{i}": with_text(each, text) for i, each in enumerate(value.values())}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    kept = {"how", "mode"}
    changes = {
        each.name: with_text(getattr(value, each.name), text)
        for each in fields(value)
        if each.name not in kept
    }
    return replace(value, **changes)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover=alert(1) x="',
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "%{x}<a href='javascript:alert(1)'>b</a>&lt;",
    "\ud800\0\u2028",
]


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1)))
def test_no_text_of_a_report_is_markup(text: str) -> None:
    hostile = [with_text(report, text or "x") for report in FULL]
    plain = seen(render(run_of(*(with_text(report, "x") for report in FULL))))
    page = render(run_of(*hostile, name=text, others=(text,)))
    found = seen(page)
    assert set(found.tags) <= {*plain.tags, "details", "summary"}
    assert found.tags.count("script") == plain.tags.count("script") == 3
    assert found.attributes == plain.attributes
    assert text.count("{") == 0 or "{{ 7 * 7 }}" not in text or "{{ 7 * 7 }}" in found.text
    charts = re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)
    assert charts is not None
    json.loads(charts[1])
    assert not re.search("[<>&]", charts[1])


def test_names_are_no_markup_for_plotly() -> None:
    run = run_of(at(1, metrics={"<b>acc</b>&amp;": 0.5}))
    names = [trace["name"] for _, figure in figures(run) for trace in figure["data"]]
    assert "&lt;b&gt;acc&lt;/b&gt;&amp;amp;" in names


def figures(run: RunHistory) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in sections_of(run):
        for each in section.figures:
            yield each.name, {"data": each.data, "layout": each.layout}


def test_plotly_knows_every_property_of_every_chart() -> None:
    found = dict(figures(run_of(*FULL)))
    assert len(found) >= 6
    for figure in found.values():
        text = re.sub(r'"--[\w-]+"', '"#123456"', json.dumps(figure))  # the page's own names
        go.Figure(json.loads(text))


def test_a_thousand_checkpoints_are_quick_and_small(tmp_path: Path) -> None:
    outputs = tuple(replace(REPORT.checks[0].outputs[0], name=f"out{i}") for i in range(4))
    checks = tuple(replace(REPORT.checks[0], outputs=outputs, sizes={"batch": n}) for n in range(9))
    many = [at(step, checks=checks, seconds={"prove": 0.1, "total": 0.2}) for step in range(1000)]
    begun = time.process_time()
    write_page(run_of(*many), tmp_path / "page.html")
    assert time.process_time() - begun < 5
    assert (tmp_path / "page.html").stat().st_size < 5_000_000


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    run = run_of(REPORT)
    missing = {section.title: section.missing for section in sections_of(run) if section.missing}
    assert "OnnxExport(latency=True)" in missing["Speed"]
    assert missing["Failures"].startswith("none")
    assert set(missing) >= {"Variants", "Validation with the ONNX model", "The graph, by module"}
    page = render(run)
    said = seen(page).text
    assert all(section.missing in said for section in sections_of(run))
    assert all(figure["data"] for _, figure in figures(run))


def test_a_run_without_any_model_has_a_page() -> None:
    failed = ExportReport(ok=False, error="No batch was seen.", code="OX200")
    found = seen(render(run_of(failed)))
    assert "No batch was seen." in found.text
    assert "example_input_array" in found.text  # the way out


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("budget", [0.0, 1e-5, float("nan")])
def test_odd_errors_and_budgets_are_shown(error: float, budget: float) -> None:
    output = OutputError(name="y", max_abs_error=error, budget=budget, ok=False)
    checks = (replace(REPORT.checks[0], outputs=(output,), ok=False),)
    render(run_of(at(1, checks=checks, metrics={"loss": error}, seconds={"prove": error})))


def test_the_same_failure_is_said_once() -> None:
    reports = [
        ExportReport(ok=False, error="Full.", code="OX500", checkpoint=f"{i}.ckpt", global_step=i)
        for i in range(30)
    ]
    (section,) = [each for each in sections_of(run_of(*reports)) if each.name == "failures"]
    (note,) = section.notes
    assert note.title == "OX500 at 30 checkpoints"
    assert note.where.endswith("and 24 more")


def test_champion_and_best_are_told_apart() -> None:
    run = run_of(
        at(1, metrics={"val_acc": 0.9}),
        at(2, metrics={"val_acc": 0.1}, tracking=TOLD),
        at(3, metrics={"val_acc": float("nan")}),
    )
    assert [run.role_of(each) for each in run.reports] == ["", "champion, best", ""]
    assert run.shown is run.reports[1]


def test_each_code_has_a_way_out() -> None:
    def codes(kind: type[OnnxportError]) -> set[str]:
        return {kind.code}.union(*map(codes, kind.__subclasses__()))

    assert set(ADVICE) == codes(OnnxportError)


def test_a_page_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<h1>mine</h1>")
    with pytest.raises(PublishError, match="was not written by onnxport"):
        write_page(run_of(REPORT), page)
    assert page.read_text() == "<h1>mine</h1>"
    page.unlink()
    write_page(run_of(REPORT), page)
    write_page(run_of(REPORT), page)
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_the_command_makes_the_page(tmp_path: Path) -> None:
    append(tmp_path / HISTORY, at(1), monitor="val_loss")
    append(tmp_path / HISTORY, ExportReport(ok=False, error="Full.", code="OX500"))
    said = CliRunner().invoke(_app(), ["report", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert said.stdout.endswith("onnxport.html: 1 of 2 checkpoints have a proven model.\n")
    page = tmp_path / "other.html"
    told = CliRunner().invoke(_app(), ["report", str(tmp_path), "--output", str(page), "--json"])
    found = json.loads(told.stdout)
    assert (found["ok"], found["proven"], found["best"]) == (True, 1, "/runs/1.onnx")
    assert page.is_file()


def test_a_folder_without_reports_ends_the_command_with_two(tmp_path: Path) -> None:
    said = CliRunner().invoke(_app(), ["report", str(tmp_path)])
    assert (said.exit_code, "No reports of onnxport" in said.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def node(kind: str, takes: list[str], gives: str, space: str = "", name: str = "") -> Any:
    made = onnx.helper.make_node(kind, takes, [gives], name=name)
    if space:
        made.metadata_props.add(key="namespace", value=space)
    return made


def graph_of(*nodes: Any) -> onnx.ModelProto:
    weight = onnx.numpy_helper.from_array(__import__("numpy").zeros((2, 3), "float32"), "w")
    value = onnx.helper.make_tensor_value_info("x", 1, ["n", 2])
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value], [], [weight]))


@pytest.mark.parametrize("by_name", [False, True])
def test_nodes_are_sorted_by_the_modules_that_they_name(by_name: bool) -> None:
    def at_module(kind: str, takes: list[str], gives: str, *path: str) -> Any:
        if by_name:
            return node(kind, takes, gives, name="/".join(["", "module", *path, gives]))
        ways = [".".join(("module", *path[: i + 1])) for i in range(len(path))]
        parts = [": w.Flat", "module: n.Net", *(f"{way}: n.Part" for way in ways), "op: aten.x"]
        return node(kind, takes, gives, "/".join(parts))

    root = boxes_of(
        graph_of(
            at_module("MatMul", ["x", "w"], "a", "body", "0"),
            at_module("Relu", ["a"], "b", "body", "1"),
            at_module("Add", ["b", "x"], "c"),
            at_module("MatMul", ["c", "w"], "d", "head"),
        )
    )
    names = [(child.name, child.operators.total()) for child in root.children]
    assert names == [("body", 2), ("", 1), ("head", 1)]
    assert (root.parameters, root.bytes, root.children[2].parameters) == (6, 24, 0)  # tied
    view = view_of(root, ["x"], ["d"])
    assert [each.title for each in view.children] == ["in: x", "body", "Add", "head", "out: d"]
    assert view.children[2].takes == "body and the input"


LAYER = "module.l.{i}: n.L/module.l.{i}.a{j}: n.A"


def test_equal_layers_are_one_box() -> None:
    layers = [
        node(
            "Relu",
            ["x"],
            f"{i}{j}",
            f": w.F/module: n.N/{LAYER.format(i=i, j=j)}/o: a",
        )
        for i in range(12)
        for j in range(2)
    ]
    view = view_of(boxes_of(graph_of(*layers)))
    (stack,) = view.children
    assert (stack.title, stack.count) == ("l.0 … l.11", 12)


def test_a_graph_that_names_no_module_is_one_box() -> None:
    view = view_of(boxes_of(graph_of(node("Relu", ["x"], "y"), node("Relu", ["y"], "z"))))
    assert (view.children, view.operators) == ((), "Relu ×2")  # noqa: RUF001
