"""The report and its way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxport.pipeline.report_files import read_report, save_report
from onnxport.report import (
    Attempt,
    AxisEvidence,
    Check,
    ExportReport,
    Latency,
    MetricPair,
    MetricParity,
    OutputError,
    Placement,
    TrackingRecord,
    Variant,
)
from onnxport.signature import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

NAMES = st.text(min_size=1, max_size=8)
TEXT = st.text(max_size=8)
MAYBE_TEXT = st.none() | TEXT
SECONDS = st.floats(0, 1e6)
SPECS = st.builds(
    TensorSpec,
    name=NAMES,
    dtype=st.just("float32"),
    shape=st.lists(st.integers(0, 9) | NAMES, max_size=3).map(tuple),
)
OUTPUTS = st.builds(
    OutputError,
    name=NAMES,
    max_abs_error=st.floats(),
    budget=st.floats(),
    ok=st.booleans(),
    reason=TEXT,
)
CHECKS = st.builds(
    Check,
    provider=TEXT,
    sizes=st.dictionaries(NAMES, st.integers(1, 99), max_size=2),
    rows=TEXT,
    reference=TEXT,
    outputs=st.lists(OUTPUTS, max_size=2).map(tuple),
    ok=st.booleans(),
)
ATTEMPTS = st.builds(
    Attempt, core=TEXT, variant=TEXT, ok=st.booleans(), reason=TEXT, seconds=SECONDS
)
EVIDENCE = st.builds(AxisEvidence, dim=TEXT, kind=TEXT, text=TEXT)
TRACKING = st.builds(
    TrackingRecord,
    uri=TEXT,
    run_id=MAYBE_TEXT,
    experiment_id=MAYBE_TEXT,
    model_id=MAYBE_TEXT,
    registered_name=MAYBE_TEXT,
    version=st.none() | st.integers(1, 99),
    alias=MAYBE_TEXT,
    missing=TEXT,
)


def tuples(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(items, max_size=2).map(tuple)


PLACEMENTS = st.builds(
    Placement,
    provider=TEXT,
    nodes=st.dictionaries(TEXT, st.dictionaries(NAMES, st.integers(1, 9), max_size=2), max_size=2),
)
LATENCIES = st.builds(
    Latency,
    name=TEXT,
    batch=st.integers(1, 64),
    runs=st.integers(5, 99),
    p50=SECONDS,
    p95=SECONDS,
    throughput=st.floats(0),
)
METRICS = st.builds(
    MetricPair, name=NAMES, torch=st.floats(), onnx=st.floats(), ok=st.booleans(), reason=TEXT
)
PARITY = st.builds(
    MetricParity,
    provider=TEXT,
    batches=st.integers(0, 9),
    calls=st.integers(0, 9),
    metrics=tuples(METRICS),
    ok=st.booleans(),
    reason=TEXT,
    seconds=SECONDS,
)
VARIANTS = st.builds(
    Variant,
    name=NAMES,
    ok=st.booleans(),
    path=MAYBE_TEXT,
    bytes=st.none() | st.integers(0, 10**12),
    checks=tuples(CHECKS),
    metric_parity=st.none() | PARITY,
    latencies=tuples(LATENCIES),
    model_id=MAYBE_TEXT,
    error=MAYBE_TEXT,
    seconds=SECONDS,
)
REPORTS = st.builds(
    ExportReport,
    ok=st.booleans(),
    path=MAYBE_TEXT,
    core=MAYBE_TEXT,
    how=st.sampled_from(["export", "refresh"]),
    checkpoint=MAYBE_TEXT,
    epoch=st.none() | st.integers(0, 99),
    global_step=st.none() | st.integers(0, 10**12),
    metrics=st.dictionaries(TEXT, st.floats(), max_size=3),
    weights_sha256=MAYBE_TEXT,
    target=TEXT,
    inputs=tuples(SPECS),
    outputs=tuples(SPECS),
    evidence=tuples(EVIDENCE),
    opset=st.none() | st.integers(11, 25),
    attempts=tuples(ATTEMPTS),
    checks=tuples(CHECKS),
    bytes=st.none() | st.integers(0, 10**12),
    placements=tuples(PLACEMENTS),
    latencies=tuples(LATENCIES),
    metric_parity=st.none() | PARITY,
    variants=tuples(VARIANTS),
    warnings=tuples(TEXT),
    seconds=st.dictionaries(TEXT, SECONDS, max_size=3),
    error=MAYBE_TEXT,
    tracking=st.none() | TRACKING,
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def check(*errors: float) -> Check:
    outputs = tuple(
        OutputError(name=f"y{place}", max_abs_error=error, budget=1.0, ok=error <= 1.0)
        for place, error in enumerate(errors)
    )
    return Check(
        provider="CPUExecutionProvider",
        sizes={"batch": 2},
        rows="real",
        reference="float64",
        outputs=outputs,
        ok=all(output.ok for output in outputs),
    )


@given(REPORTS)
def test_a_report_survives_json(report: ExportReport) -> None:
    # NaN is not equal to itself; what is printed is.
    assert repr(ExportReport.from_json(report.to_json())) == repr(report)


@given(REPORTS)
def test_the_json_is_strict(report: ExportReport) -> None:
    json.loads(report.to_json(), parse_constant=refuse)


def test_a_report_with_finite_numbers_is_equal_after_its_way_through_json() -> None:
    report = ExportReport(ok=True, metrics={"loss": 0.25}, checks=(check(0.5, 0.0),))
    assert ExportReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_come_back_as_numbers(value: float) -> None:
    report = ExportReport(ok=False, metrics={"loss": value})
    back = ExportReport.from_json(report.to_json()).metrics["loss"]
    assert isinstance(back, float)
    assert repr(back) == repr(value)


def test_the_json_names_the_dynamic_axes_for_other_readers() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    static = TensorSpec(name="y", dtype="float32", shape=(3,))
    report = ExportReport(ok=True, inputs=(spec,), outputs=(static,))
    assert report.dynamic_axes == {"x": {0: "batch"}}
    assert json.loads(report.to_json())["dynamic_axes"] == {"x": {"0": "batch"}}


def test_the_largest_error_is_that_of_any_output_in_any_check() -> None:
    assert ExportReport(ok=True, checks=(check(0.1, 0.3), check(0.2))).max_abs_error == 0.3
    assert ExportReport(ok=False, checks=(check(0.1), check(math.inf))).max_abs_error == math.inf
    assert ExportReport(ok=False).max_abs_error is None


def test_a_report_of_an_earlier_version_can_be_read() -> None:
    data = json.loads(ExportReport(ok=True, checks=(check(0.5),)).to_json())
    for name in ("bytes", "placements", "latencies", "metric_parity", "variants"):
        del data[name]
    assert ExportReport.from_json(json.dumps(data)) == ExportReport(ok=True, checks=(check(0.5),))


def test_what_runs_elsewhere_is_counted_over_all_other_providers() -> None:
    found = Placement(provider="A", nodes={"A": {"Add": 3}, "B": {"If": 1}, "C": {"If": 2}})
    assert found.elsewhere == {"If": 3}


def test_a_tracking_record_is_added_to_a_copy() -> None:
    report, record = ExportReport(ok=True), TrackingRecord(uri="sqlite:///x.db", version=3)
    assert report.with_tracking(record).tracking == record
    assert report.tracking is None


def test_a_report_cannot_be_changed() -> None:
    report = ExportReport(ok=False)
    with pytest.raises(dataclasses.FrozenInstanceError, match="ok"):
        report.ok = True  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ok": true}', '{"metrics": {}}'])
def test_what_is_no_report_is_not_read_as_one(text: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError), match=r".+"):
        ExportReport.from_json(text)


def test_a_saved_report_is_read_back(tmp_path: Path) -> None:
    report = ExportReport(ok=True, path="model.onnx", metrics={"loss": math.inf})
    save_report(report, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx.json"]
    assert read_report(tmp_path / "model.onnx") == report


def test_without_a_report_none_is_read(tmp_path: Path) -> None:
    assert read_report(tmp_path / "model.onnx") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"metrics": []}',
        b'{"ok": true, "metrics": {}, "more": 1}',
    ],
)
def test_another_programs_file_beside_a_model_is_no_report_of_ours(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx.json").write_bytes(content)
    assert read_report(tmp_path / "model.onnx") is None


def test_a_report_that_cannot_be_written_is_logged_and_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    save_report(ExportReport(ok=False), tmp_path / "file" / "model.onnx")
    assert "was not written" in caplog.text
