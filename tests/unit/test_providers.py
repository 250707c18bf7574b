"""Which execution providers are proven on: those that really run, and no other silently."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from onnxport.errors import VerificationError
from onnxport.validation import providers, session
from onnxport.validation.providers import resolve_providers
from onnxport.validation.session import CPU, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

CUDA = "CUDAExecutionProvider"


@pytest.fixture(autouse=True)
def _forget_what_runs() -> Iterator[None]:
    providers._really_runs.cache_clear()
    yield
    providers._really_runs.cache_clear()


def runtime(
    monkeypatch: pytest.MonkeyPatch, *, listed: list[str], used: list[str], fails: bool = False
) -> Any:
    """An ONNX Runtime that lists some providers and whose sessions get some of them."""
    fake = create_autospec(onnxruntime)
    fake.get_available_providers.return_value = listed
    made = create_autospec(onnxruntime.InferenceSession, instance=True)
    made.get_providers.return_value = used
    made.get_inputs.return_value = [create_autospec(onnxruntime.NodeArg, instance=True)]
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.full(1, 2.0, np.float32))
    made.run_with_ort_values.return_value = [value]
    if fails:
        made.run_with_ort_values.side_effect = RuntimeError("CUDA driver version is insufficient")
    fake.InferenceSession.return_value = made
    monkeypatch.setattr(session, "_runtime", lambda: fake)
    return fake


def test_auto_takes_cuda_up_where_it_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = runtime(monkeypatch, listed=[CUDA, CPU], used=[CUDA, CPU])
    assert resolve_providers("auto") == (CPU, CUDA)
    (call,) = fake.InferenceSession.call_args_list
    ((name, told), last) = call.kwargs["providers"]
    assert (name, told["use_tf32"], last) == (CUDA, "0", CPU)
    fake.InferenceSession.return_value.run_with_ort_values.assert_called_once()


def test_an_output_that_is_an_input_is_the_callers_own() -> None:
    info = onnx.helper.make_tensor_value_info("x", 1, [None, 3])
    graph = onnx.helper.make_graph([], "through", [info], [info])
    model = onnx.helper.make_model(graph, ir_version=10)
    x = torch.arange(6.0).reshape(3, 2).T  # not contiguous: what is fed is a copy
    (result,) = Session(model.SerializeToString()).run(["x"], [x])
    filler = [torch.full((2, 3), -1.0) for _ in range(100)]
    assert torch.equal(result, x)
    assert filler


def test_auto_asks_each_provider_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = runtime(monkeypatch, listed=[CUDA, CPU], used=[CUDA, CPU])
    assert resolve_providers("auto") == resolve_providers("auto")
    assert fake.InferenceSession.call_count == 1


@pytest.mark.parametrize(
    ("used", "fails"), [([CPU], False), ([CUDA, CPU], True)], ids=["falls back", "does not run"]
)
def test_auto_leaves_out_what_is_listed_but_does_not_run(
    used: list[str], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime(monkeypatch, listed=[CUDA, CPU], used=used, fails=fails)
    assert resolve_providers("auto") == (CPU,)


def test_a_session_that_falls_back_to_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(monkeypatch, listed=[CUDA, CPU], used=[CPU])
    match = rf"asked for {CUDA} and has {CPU} instead"
    with pytest.raises(VerificationError, match=match):
        Session(b"a model", CUDA)


def test_a_provider_that_is_asked_for_by_name_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = runtime(monkeypatch, listed=[CPU], used=[CPU])
    assert resolve_providers((CUDA,)) == (CUDA,)
    with pytest.raises(VerificationError, match=f"asked for {CUDA}"):
        Session(b"a model", CUDA)
    fake.InferenceSession.assert_not_called()
