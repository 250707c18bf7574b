"""A template that is loaded once, and the weights of a file that are given to it."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from onnxport.config import ExportOptions
from onnxport.errors import PublishError, VerificationError
from onnxport.exporter import writer
from onnxport.exporter.model_file import mapped_weights
from onnxport.exporter.template import Slot, Template
from onnxport.exporter.writer import write_filled
from onnxport.pipeline import (
    ExportJob,
    GivenModule,
    Pipeline,
    candidate,
    open_template,
    refresh,
    run,
)
from onnxport.pipeline.open_template import OpenTemplate
from onnxport.tree import Example
from onnxport.validation.session import CPU, PrepSessions, Session

if TYPE_CHECKING:
    from pathlib import Path

ROWS = torch.linspace(-1, 1, 24).reshape(6, 4)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).eval()


def _job(module: nn.Module, path: Path) -> ExportJob:
    return ExportJob(
        source=GivenModule(module),
        examples=(Example((ROWS,), {}),),
        path=path,
        options=ExportOptions(),
    )


@pytest.fixture
def known(tmp_path: Path) -> tuple[nn.Module, Template]:
    module, pipeline = _net(), Pipeline()
    assert pipeline.run(_job(module, tmp_path / "m.onnx")).ok
    assert pipeline.blueprint is not None
    return module, pipeline.blueprint.template


def _filled(template: Template, module: nn.Module, path: Path) -> Path:
    tensors = template.fill(module.state_dict(), PrepSessions())
    write_filled(template, path, tensors, lambda: {"key": "value"})
    return path


@pytest.mark.parametrize("external", [False, True])
def test_the_weights_of_a_file_are_run_where_they_lie(
    known: tuple[nn.Module, Template],
    tmp_path: Path,
    external: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, template = known
    other = _net()
    if external:
        monkeypatch.setattr(writer, "EXTERNAL_DATA_BYTES", 1)
    path = _filled(template, other, tmp_path / "other.onnx")
    assert path.with_name("other.onnx.data").exists() is external
    model = OpenTemplate(template).with_file(path, CPU)
    assert model is not None
    (found,) = model.run(["x", "input"], [ROWS, ROWS])
    torch.testing.assert_close(found, other(ROWS))


def test_tensors_in_memory_will_do(known: tuple[nn.Module, Template]) -> None:
    _, template = known
    other = _net()
    tensors = list(template.fill(other.state_dict(), PrepSessions()))
    model = OpenTemplate(template).with_tensors(tensors, CPU)
    assert model is not None
    torch.testing.assert_close(model.run(["x", "input"], [ROWS, ROWS])[0], other(ROWS))


@pytest.mark.parametrize("place", [40, -1, -100])
def test_a_file_that_was_not_written_from_the_template_is_refused(
    known: tuple[nn.Module, Template], tmp_path: Path, place: int
) -> None:
    module, template = known
    path = _filled(template, module, tmp_path / "other.onnx")
    weights = mapped_weights(path, template.head, template.graph, template.slots)
    assert set(weights) == {slot.name for slot in template.slots}
    raw = bytearray(path.read_bytes())
    if place < 0:  # the file ends too early
        del raw[place:]
    else:  # the graph is another one
        raw[place] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(PublishError):
        mapped_weights(path, template.head, template.graph, template.slots)


def test_empty_and_scalar_weights_are_found(tmp_path: Path) -> None:
    slots = (
        Slot(name="none", elem_type=1, dims=(0, 3)),
        Slot(name="one", elem_type=7, dims=()),
        Slot(name="half", elem_type=16, dims=(3,)),
    )
    template = Template(head=b"", graph=b"", slots=slots, pieces=(), entries={})
    half = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)
    tensors = [torch.empty(0, 3), torch.tensor(7), half]
    write_filled(template, tmp_path / "m.onnx", tensors, dict)
    found = mapped_weights(tmp_path / "m.onnx", b"", b"", slots)
    assert found["none"].shape == (0, 3)
    assert found["one"] == 7
    assert found["half"].dtype.name == "bfloat16"
    assert found["half"].astype("float32").tolist() == half.tolist()


def test_bfloat16_goes_in_as_it_lies_in_a_file() -> None:
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
            "cast",
            [value("w", TensorProto.BFLOAT16, [2])],
            [value("y", TensorProto.FLOAT, [2])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    raw = b"\0" + torch.tensor([1.5, -2.0]).bfloat16().view(torch.uint8).numpy().tobytes()
    weight = np.frombuffer(raw, helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16), 2, 1)
    (found,) = Session(model.SerializeToString()).run(["w"], [weight])
    assert found.tolist() == [1.5, -2.0]


def test_sessions_stay_in_their_process(known: tuple[nn.Module, Template]) -> None:
    module, template = known
    opened = OpenTemplate(template)
    tensors = list(template.fill(module.state_dict(), PrepSessions()))
    assert opened.with_tensors(tensors, CPU) is not None
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301 - our own
    assert again.template == opened.template


def test_a_graph_that_wants_constant_weights_is_proven_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise VerificationError("B must be a constant")

    loaded = []
    monkeypatch.setattr(open_template, "Session", refuse)
    pipeline, module = Pipeline(), _net()
    assert pipeline.run(_job(module, tmp_path / "first.onnx")).how == "export"
    assert pipeline.blueprint is not None

    session = refresh.Session
    monkeypatch.setattr(
        refresh, "Session", lambda *args, **kwargs: loaded.append(args) or session(*args, **kwargs)
    )
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    report = pipeline.run(_job(module, tmp_path / "second.onnx"))
    assert report.how == "refresh", report.attempts
    assert len(loaded) == 1


def test_the_graph_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(model: object, *args: object, **kwargs: object) -> Session:
        loaded.append(model)
        return Session(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(open_template, "Session", load)
    pipeline, module = Pipeline(), _net()
    for place in range(3):
        report = pipeline.run(_job(module, tmp_path / f"{place}.onnx"))
        assert report.how == ("refresh" if place else "export")
        with torch.no_grad():
            module[0].weight.mul_(1.5)
    assert len(loaded) == 1


def test_a_disk_that_refuses_the_file_late_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PublishError("the disk is gone")

    monkeypatch.setattr(candidate, "sync_model", refuse)
    report = Pipeline().run(_job(_net(), tmp_path / "m.onnx"))
    assert not report.ok
    assert "the disk is gone" in str(report.error)
    assert not (tmp_path / "m.onnx").exists()


def test_weights_that_cannot_be_hashed_are_no_cores_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> str:
        raise RuntimeError("a sparse tensor")

    monkeypatch.setattr(run, "weights_sha256", refuse)
    report = Pipeline().run(_job(_net(), tmp_path / "m.onnx"))
    assert not report.ok
    assert "a sparse tensor" in str(report.error)
    assert not list(tmp_path.glob("*.failed"))
