"""What is said about nodes that run elsewhere, and what providers are told."""

from __future__ import annotations

import pickle
import weakref
from typing import TYPE_CHECKING

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import onnxport
from onnxport.config import ExportOptions, Verify
from onnxport.errors import ConfigurationError, ProviderError, VerificationError
from onnxport.pipeline import verdict
from onnxport.pipeline.placement import elsewhere_text, is_unused, placement_of, require_used
from onnxport.pipeline.verdict import Verdict, on_each_provider
from onnxport.report import Check, ExportReport, Latency, Placement
from onnxport.tracking.description import _latency_points
from onnxport.validation import provider_options
from onnxport.validation.graph import nodes_of_sizes
from onnxport.validation.latency import latencies
from onnxport.validation.provider_options import is_out_of_memory, memory_limit, options_for
from onnxport.validation.session import (
    CPU,
    PlacedNode,
    Session,
    _refusals,
)

if TYPE_CHECKING:
    from pathlib import Path

CUDA, OPENVINO = "CUDAExecutionProvider", "OpenVINOExecutionProvider"
NODES = (
    PlacedNode(CUDA, "MatMul", "a"),
    PlacedNode(CPU, "Shape", "b"),
    PlacedNode(CPU, "Gather", "c"),
    PlacedNode(CPU, "NonZero", "d"),
)


def text_of(nodes: tuple[PlacedNode, ...], *sizes: str) -> str:
    return elsewhere_text(placement_of(CUDA, nodes), nodes, lambda: sizes)


def test_nodes_are_counted_by_provider_and_operator() -> None:
    placement = placement_of(CUDA, (*NODES, PlacedNode(CUDA, "MatMul", "e")))
    assert placement == Placement(
        provider=CUDA,
        nodes={CPU: {"Shape": 1, "Gather": 1, "NonZero": 1}, CUDA: {"MatMul": 2}},
    )
    assert placement_of(CUDA, ()) is None
    assert not is_unused(placement)


def test_nodes_that_compute_sizes_are_no_reason_to_warn() -> None:
    assert text_of(NODES[:3], "b", "c") == ""
    assert text_of(NODES, "b", "c") == (
        f"{CUDA} does not run 1 of the model's 4 nodes; {CPU} does: NonZero (1). "
        "So do 2 that compute sizes, as is usual."
    )
    assert text_of(NODES) == (
        f"{CUDA} does not run 3 of the model's 4 nodes; {CPU} does: "
        "Shape (1), Gather (1), NonZero (1)."
    )
    assert text_of(NODES[:1]) == ""


def test_a_provider_that_was_asked_for_must_run_something() -> None:
    require_used(None)
    require_used(placement_of(CUDA, NODES))
    unused = placement_of(CUDA, NODES[1:])
    with pytest.raises(
        VerificationError, match=r"asked for by name and runs none .* NonZero \(1\)"
    ):
        require_used(unused)
    assert "none of the model's nodes" in elsewhere_text(unused, NODES[1:], frozenset)


def test_only_what_depends_on_sizes_alone_computes_sizes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], name="rows"),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], name="filled"),
        helper.make_node("Add", ["filled", "x"], ["sum"], name="sum"),
        helper.make_node("Gather", ["sum", "rows"], ["y"], name="picked"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("zero", TensorProto.INT64, [], [0])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    assert nodes_of_sizes(path) == {"shape", "rows"}


def test_a_session_says_who_has_taken_which_node() -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["y"], name="n")], "g", *([i] for i in info)
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    session = Session(model)
    assert session.placed() == (PlacedNode(CPU, "Abs", "n"),)
    held = weakref.ref(session._session)
    session.close()
    assert held() is None


@pytest.mark.parametrize(
    ("provider", "wanted"),
    [
        (CPU, {}),
        (CUDA, {"gpu_mem_limit": "5", "arena_extend_strategy": "kSameAsRequested"}),
        ("MIGraphXExecutionProvider", {"migraphx_mem_limit": "5"}),
        ("TensorrtExecutionProvider", {"trt_max_workspace_size": "5"}),
        (OPENVINO, {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}),
        ("AnyExecutionProvider", {}),
    ],
)
def test_a_provider_is_told_to_be_exact_and_to_take_little(
    provider: str, wanted: dict[str, str]
) -> None:
    told = options_for(provider, threads=3, memory=5)
    assert wanted.items() <= told.items()
    assert bool(told) == bool(wanted)


def test_a_check_takes_a_part_of_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_options, "_free_bytes", lambda: 4000)
    assert memory_limit(CUDA, None) == 1000
    assert memory_limit(CUDA, 2) == 2 * 2**20
    assert memory_limit(CPU, 2) is None
    monkeypatch.setattr(provider_options, "_free_bytes", lambda: None)
    assert memory_limit(CUDA, None) == 2**30


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc",
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 4096",
        "Available memory of 1048576 is smaller than requested bytes of 16777216",
    ],
)
def test_too_little_memory_on_a_device_is_told_from_other_failures(text: str) -> None:
    assert is_out_of_memory(text)
    advice = r"too little memory\. Verify\(gpu_memory_mb=\)"
    with pytest.raises(ProviderError, match=advice) as caught, _refusals(CUDA, "It fails"):
        raise RuntimeError(text)
    assert caught.value.out_of_memory
    assert pickle.loads(pickle.dumps(caught.value)).out_of_memory  # noqa: S301 - our own bytes
    with pytest.raises(ProviderError) as caught, _refusals(CPU, "It fails"):
        raise RuntimeError(text)
    assert not caught.value.out_of_memory


CHECK = Check(provider=CPU, sizes={}, rows="real", reference="table", outputs=(), ok=True)


def prove(provider: str, before: tuple[Check, ...]) -> Verdict:
    """Prove on the CPU, and have too little memory elsewhere.

    Raises:
        ProviderError: If it is elsewhere.
    """
    if provider != CPU:
        assert before == (CHECK,)
        raise ProviderError("ONNX Runtime fails: too little memory.", before)
    return Verdict(checks=(CHECK,))


@pytest.fixture(autouse=True)
def _two_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(wanted: object) -> object:
        return (CPU, CUDA) if wanted == "auto" else wanted

    monkeypatch.setattr(verdict, "resolve_providers", resolve)


def test_too_little_memory_beside_training_is_a_warning() -> None:
    made = on_each_provider(Verify(), prove)
    assert made.checks == (CHECK,)
    (warning,) = made.warnings
    assert warning.startswith(f"Not proven on {CUDA}, which refuses the model. ONNX Runtime fails:")
    assert on_each_provider(Verify(), prove, [CUDA]).warnings == ()


def test_too_little_memory_fails_a_proof_that_was_asked_for_by_name() -> None:
    with pytest.raises(ProviderError):
        on_each_provider(Verify(providers=(CPU, CUDA)), prove)


def test_a_wrong_number_on_an_accelerator_fails_the_proof() -> None:
    def disagree(provider: str, _: tuple[Check, ...]) -> Verdict:
        if provider != CPU:
            raise VerificationError("They disagree.")
        return Verdict()

    with pytest.raises(VerificationError, match="They disagree"):
        on_each_provider(Verify(), disagree)


def test_what_the_cpu_refuses_is_refused() -> None:
    def refuse(*_: object) -> Verdict:
        raise ProviderError("It does not load.")

    with pytest.raises(ProviderError):
        on_each_provider(Verify(), refuse)


@pytest.mark.parametrize(("given", "seconds"), [(False, 0.0), (True, 3.0), (7, 7.0), (0.5, 0.5)])
def test_latency_is_a_time(given: bool | float, seconds: float) -> None:
    options = ExportOptions.of(
        core="auto", inputs=None, opset=None, precision=None, verify=True, latency=given
    )
    assert options.latency_s == seconds


@pytest.mark.parametrize("given", [-1, float("nan"), float("inf"), "3", None])
def test_what_is_no_time_is_refused(given: object, tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 1)
    with pytest.raises(ConfigurationError, match="latency must be True, False or seconds"):
        onnxport.export(net, torch.ones(2, 2), tmp_path / "a", latency=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [0, -1, 1.5, True])
def test_memory_is_a_whole_number_of_mib(memory: float) -> None:
    with pytest.raises(
        ConfigurationError, match=r"Verify\(gpu_memory_mb=\) must be a whole number"
    ):
        Verify(gpu_memory_mb=memory)  # type: ignore[arg-type]
    assert Verify(gpu_memory_mb=512).gpu_memory_mb == 512


def test_a_dear_run_is_made_as_often_as_there_is_time_for() -> None:
    ran: list[int] = []
    (found,) = latencies({"it": lambda: ran.append(1)}, 1, -1.0, warm_up=1, least=2)
    assert (found.runs, len(ran)) == (2, 3)


def test_medians_become_metrics_by_batch_and_way() -> None:
    def one(name: str, batch: int) -> Latency:
        return Latency(name=name, batch=batch, runs=9, p50=0.002, p95=0.003, throughput=1.0)

    report = ExportReport(ok=True, latencies=(one(CPU, 1), one(OPENVINO, 8), one("eager", 1)))
    assert _latency_points(report) == {
        "onnx/latency_ms_b1": 2.0,
        "onnx/latency_ms_b8_openvino": 2.0,
        "onnx/latency_ms_b1_eager": 2.0,
    }
