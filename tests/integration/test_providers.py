"""Models are proven on a second execution provider, and what it leaves to others is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from on_openvino import CASES, OPENVINO

import onnxport
from onnxport.report import ExportReport
from onnxport.validation.session import CPU

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".openvino" / "site"
TAKEN = ("pictures", "series", "vit")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of exports and of a training, side by side in two processes."""
    if not (ROOT / ".openvino" / ".installed").exists():
        if "ONNXPORT_REQUIRE_OPENVINO" in os.environ:
            pytest.fail("There is no .openvino/.installed: see the Makefile.")
        pytest.skip("OpenVINO is not in .openvino: make test puts it there")
    path = os.pathsep.join([str(SITE), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path, "ONNXPORT_CACHE_DIR": ""}
    running = {}
    for what in ("exports", "training"):
        folder = tmp_path_factory.mktemp(what)
        environment["ONNXPORT_CACHE_DIR"] = str(folder / "memory")
        command = [sys.executable, str(ROOT / "tests" / "on_openvino.py"), what, str(folder)]
        running[what] = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
    said = {what: process.communicate(timeout=280)[0] for what, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0]
    return {what: json.loads(text.splitlines()[-1]) for what, text in said.items()}


def report_of(content: Any) -> ExportReport:
    assert isinstance(content, dict), content
    return ExportReport.from_json(json.dumps(content))


def of_providers(report: ExportReport) -> list[str]:
    return [text for text in report.warnings if OPENVINO in text]


def providers(report: ExportReport) -> set[str]:
    return {check.provider for check in report.checks}


@pytest.fixture
def exported(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The exports alone."""
    assert list(done["exports"]) == list(CASES)
    return done["exports"]


@pytest.fixture
def trained(done: dict[str, dict[str, Any]]) -> list[ExportReport]:
    """The reports of the training."""
    return [report_of(content) for content in done["training"].values()]


@pytest.mark.parametrize("name", TAKEN)
def test_models_are_proven_on_openvino(name: str, exported: dict[str, Any]) -> None:
    report = report_of(exported[name])
    wanted = {OPENVINO} if name == "vit" else {CPU, OPENVINO}
    assert providers(report) == {one.provider for one in report.placements} == wanted
    placed = next(one for one in report.placements if one.provider == OPENVINO)
    assert placed.elsewhere == {}
    assert sum(placed.nodes[OPENVINO].values()) > 1
    assert of_providers(report) == []


@pytest.mark.parametrize(("name", "count"), [("mends", 1), ("mends, asked", 1), ("bert", 2)])
def test_what_another_provider_runs_is_said_by_operator(
    name: str, count: int, exported: dict[str, Any]
) -> None:
    report = report_of(exported[name])
    assert OPENVINO in providers(report)
    placed = next(one for one in report.placements if one.provider == OPENVINO)
    assert placed.elsewhere == {"IsNaN": count}
    (warning,) = of_providers(report)
    assert warning.startswith(f"{OPENVINO} does not run {count} of the model's ")
    assert warning.endswith(f"{CPU} does: IsNaN ({count}).")


def test_a_provider_that_was_asked_for_and_takes_nothing_fails(exported: dict[str, Any]) -> None:
    text = f"{OPENVINO} was asked for by name and runs none of the model's nodes. They run on {CPU}"
    assert f"{text}: IsNaN (1)." in exported["nan, asked"]


def test_a_model_of_which_a_provider_takes_nothing_is_proven_without_it(
    exported: dict[str, Any],
) -> None:
    report = report_of(exported["nan"])
    assert providers(report) == {CPU}
    (warning,) = report.warnings
    assert warning.startswith(f"{OPENVINO} runs here, but none of the model's nodes")


def test_a_provider_that_refuses_a_model_is_a_failure_only_where_it_was_asked_for(
    exported: dict[str, Any],
) -> None:
    report = report_of(exported["samples"])
    assert providers(report) == {CPU}
    (warning,) = report.warnings
    assert warning.startswith(f"Not proven on {OPENVINO}, which refuses the model.")
    assert "GridSample" in warning
    assert "GridSample" in exported["samples, asked"]


def test_each_checkpoint_of_a_training_is_proven_on_both(trained: list[ExportReport]) -> None:
    assert [report.how for report in trained] == ["export", "refresh"]
    for report in trained:
        assert report.ok, report.error
        assert providers(report) == {CPU, OPENVINO}
        assert report.warnings == ()


def test_a_refresh_carries_over_what_is_true_of_the_graph(trained: list[ExportReport]) -> None:
    first, second = trained
    assert [one.provider for one in first.placements] == [CPU, OPENVINO]
    assert first.placements == second.placements
    assert {one.name for one in first.latencies} == {CPU, OPENVINO, "eager"}
    assert first.latencies == second.latencies
    assert "latency" in first.seconds
    assert "latency" not in second.seconds
    for report in trained:
        assert report.bytes == Path(str(report.path)).stat().st_size


def test_a_graph_that_a_provider_refuses_is_not_offered_to_it_again() -> None:
    from onnxport.pipeline.verdict import refused_before

    warning = f"Not proven on {OPENVINO}, which refuses the model. ONNX Runtime does not load it."
    assert refused_before([warning, "Traced: one line."]) == {OPENVINO}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """A model made with what is installed here."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXPORT_CACHE_DIR", str(folder / "memory"))
        return onnxport.export(net, torch.randn(8, 4), folder / "a.onnx", core="trace", latency=2)


def test_on_the_cpu_alone_there_is_nothing_to_warn_of(plain: ExportReport) -> None:
    assert providers(plain) == {CPU}
    (placed,) = plain.placements
    assert placed.nodes == {CPU: {"Gemm": 1, "Relu": 1}}
    assert plain.warnings == ()
    assert plain.bytes == Path(str(plain.path)).stat().st_size


def test_latency_is_measured_beside_pytorch_at_several_sizes(plain: ExportReport) -> None:
    found = {(one.name, one.batch): one for one in plain.latencies}
    assert {(CPU, 1), ("eager", 1)} <= set(found)
    for (_, batch), one in found.items():
        assert 0 < one.p50 <= one.p95
        assert one.throughput == pytest.approx(batch / one.p50)


def test_latency_is_not_measured_where_nobody_asks(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 3)
    report = onnxport.export(net, torch.randn(8, 4), tmp_path / "a.onnx", core="trace")
    assert report.latencies == ()
    assert "latency" not in report.seconds


def test_a_provider_that_is_listed_and_takes_nothing_fails_by_name(tmp_path: Path) -> None:
    """The package for the CPU holds one that waits for an operator of its own."""
    azure = "AzureExecutionProvider"
    import onnxruntime

    if azure not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime holds no such provider")
    wanted = onnxport.Verify(providers=(azure,))
    with pytest.raises(onnxport.ExportError, match=f"{azure} was asked for by name and runs none"):
        onnxport.export(
            torch.nn.Linear(4, 3), torch.randn(8, 4), tmp_path / "a", core="trace", verify=wanted
        )
