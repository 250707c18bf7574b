"""Graphs without weights: what is optimised, what is cut off, and what a file is made of."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxport.errors import ExportError, PublishError
from onnxport.exporter.model_file import mapped_twin, write_inline
from onnxport.exporter.symbolic import optimize_symbolically
from onnxport.exporter.template import StaleTemplateError, Template, make_template
from onnxport.validation.session import PrepSessions, Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FLOAT = TensorProto.FLOAT


def graph(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, torch.Tensor],
    *,
    columns: int = 4,
    outputs: Sequence[str] = ("y",),
) -> ir.Model:
    proto = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", columns])],
        [
            helper.make_tensor_value_info(name, FLOAT, ["n", "m"] if name == "y" else ["m"])
            for name in outputs
        ],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(proto, opset_imports=opset, ir_version=10))


def template_of(model: ir.Model, weights: Mapping[str, torch.Tensor]) -> Template:
    known = {value: name for name, value in model.graph.initializers.items() if name in weights}
    return make_template(model, known, weights, PrepSessions())


def filled(template: Template, weights: Mapping[str, torch.Tensor], path: Path) -> Path:
    with path.open("wb", buffering=0) as file:
        tensors = template.fill(weights, PrepSessions())
        write_inline(file, template.head, template.graph, template.slots, tensors)
    return path


def run(path: Path, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return Session(path, **options).run(("x",), (x,))[0]


def kinds(template: Template) -> list[str]:
    return [node.op_type for node in onnx.GraphProto.FromString(template.graph).node]


NODE = helper.make_node


def test_a_transposed_weight_is_stored_transposed(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    nodes = [
        NODE("Transpose", ["w"], ["wt"], perm=[1, 0]),
        NODE("MatMul", ["x", "wt"], ["xw"]),
        NODE("Add", ["xw", "b"], ["y"]),
    ]
    template = template_of(graph(nodes, weights), weights)
    assert kinds(template) == ["MatMul", "Add"]
    assert {slot.name: slot.source for slot in template.slots} == {"b": "b", "w.prepared": None}
    for seed in range(2):
        other = {"w": torch.randn(3, 4) + seed, "b": torch.randn(3)}
        x = torch.randn(5, 4)
        expected = x @ other["w"].T + other["b"]
        torch.testing.assert_close(run(filled(template, other, tmp_path / "m.onnx"), x), expected)


def test_what_is_prepared_is_named_after_its_entries(tmp_path: Path) -> None:
    weights = {"a": torch.randn(4, 4), "b": torch.randn(4, 4), "a.prepared": torch.randn(4)}
    nodes = [
        NODE("Transpose", ["a"], ["val_7"], perm=[1, 0]),
        NODE("Neg", ["val_7"], ["val_8"]),
        NODE("MatMul", ["x", "val_7"], ["h"]),
        NODE("MatMul", ["h", "val_8"], ["h2"]),
        NODE("Add", ["h2", "a.prepared"], ["h3"]),
        NODE("Mul", ["a.prepared", "b"], ["val_10"]),
        NODE("MatMul", ["h3", "val_10"], ["y"]),
    ]
    template = template_of(graph(nodes, weights), weights)
    names = [slot.name for slot in template.slots]
    assert names == ["a.prepared", "a.prepared2", "a.prepared3", "a.prepared+1.prepared"]
    x = torch.randn(5, 4)
    expected = x @ weights["a"].T @ -weights["a"].T + weights["a.prepared"]
    expected = expected @ (weights["a.prepared"] * weights["b"])
    found = run(filled(template, weights, tmp_path / "m.onnx"), x)
    torch.testing.assert_close(found, expected)


def test_pieces_of_one_structure_are_the_same_bytes() -> None:
    weights = {f"w{i}": torch.randn(4, 4) for i in range(3)}
    nodes, last = [], "x"
    for i in range(3):
        nodes += [
            NODE("Transpose", [f"w{i}"], [f"t{i}"], perm=[1, 0]),
            NODE("MatMul", [last, f"t{i}"], ["y" if i == 2 else f"h{i}"]),
        ]
        last = f"h{i}"
    template = template_of(graph(nodes, weights), weights)
    assert len(template.pieces) == 3
    assert len({piece.model for piece in template.pieces}) == 1


def test_a_constant_that_two_pieces_need_does_not_tie_them() -> None:
    weights = {"a": torch.randn(4), "b": torch.randn(4)}
    two = helper.make_tensor("t", FLOAT, [], [2.0])
    nodes = [
        NODE("Constant", [], ["two"], value=two),
        NODE("Mul", ["a", "two"], ["a2"]),
        NODE("Mul", ["b", "two"], ["b2"]),
        NODE("Add", ["x", "a2"], ["h"]),
        NODE("Add", ["h", "b2"], ["y"]),
    ]
    template = template_of(graph(nodes, weights), weights)
    assert [piece.sources for piece in template.pieces] == [("a",), ("b",)]
    assert len({piece.model for piece in template.pieces}) == 1


def test_values_that_meet_later_are_one_piece() -> None:
    weights = {"a": torch.randn(4), "b": torch.randn(4)}
    nodes = [
        NODE("Neg", ["a"], ["a2"]),
        NODE("Neg", ["b"], ["b2"]),
        NODE("Mul", ["a2", "b2"], ["ab"]),
        NODE("Add", ["x", "ab"], ["y"]),
    ]
    template = template_of(graph(nodes, weights), weights)
    assert [piece.sources for piece in template.pieces] == [("a", "b")]
    assert [slot.name for slot in template.slots] == ["a+1.prepared"]


def test_a_large_weight_that_is_used_as_it_is_too_stays_one() -> None:
    weights = {"w": torch.randn(600, 600)}
    nodes = [
        NODE("Transpose", ["w"], ["wt"], perm=[1, 0]),
        NODE("MatMul", ["x", "wt"], ["h"]),
        NODE("MatMul", ["h", "w"], ["y"]),
    ]
    template = template_of(graph(nodes, weights, columns=600), weights)
    assert kinds(template) == ["Transpose", "MatMul", "MatMul"]
    assert [slot.source for slot in template.slots] == ["w"]


def test_what_would_make_a_file_much_larger_stays_in_the_graph() -> None:
    weights = {"w": torch.randn(1, 4)}
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [200_000, 4])
    nodes = [
        NODE("Constant", [], ["shape"], value=shape),
        NODE("Expand", ["w", "shape"], ["wide"]),
        NODE("Add", ["x", "wide"], ["y"]),
    ]
    template = template_of(graph(nodes, weights), weights)
    assert "Expand" in kinds(template)


def test_what_depends_on_no_weight_is_computed_once() -> None:
    weights = {"w": torch.randn(4)}
    nodes = [
        NODE("Constant", [], ["two"], value_float=2.0),
        NODE("Mul", ["two", "two"], ["four"]),
        NODE("Mul", ["w", "four"], ["scaled"]),
        NODE("Add", ["x", "four"], ["h"]),
        NODE("Mul", ["h", "scaled"], ["y"]),
    ]
    template = template_of(graph(nodes, weights), weights)
    assert kinds(template) == ["Add", "Mul"]
    names = {init.name for init in onnx.GraphProto.FromString(template.graph).initializer}
    assert names == {"four"}


def test_a_weight_that_is_an_output_stays(tmp_path: Path) -> None:
    weights = {"w": torch.randn(4)}
    nodes = [NODE("Identity", ["w"], ["copy"]), NODE("Mul", ["x", "w"], ["y"])]
    template = template_of(graph(nodes, weights, outputs=("y", "copy")), weights)
    other = {"w": torch.arange(4.0)}
    path = filled(template, other, tmp_path / "m.onnx")
    assert Session(path).run(("x",), (torch.ones(1, 4),))[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("node", ["Add", "Mul"])
def test_optimising_does_not_look_at_values(node: str) -> None:
    weights = {"w": torch.zeros(4) if node == "Add" else torch.ones(4)}
    model = graph([NODE(node, ["x", "w"], ["h"]), NODE("Relu", ["h"], ["y"])], weights)
    optimize_symbolically(model, {"w"})
    assert [each.op_type for each in model.graph] == [node, "Relu"]
    assert model.graph.initializers["w"].const_value is not None
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_equal_weights_stay_two() -> None:
    weights = {"a": torch.ones(4), "b": torch.ones(4)}
    model = graph([NODE("Add", ["x", "a"], ["h"]), NODE("Mul", ["h", "b"], ["y"])], weights)
    optimize_symbolically(model, {"a", "b"})
    assert set(model.graph.initializers) == {"a", "b"}


def test_an_initializer_that_is_not_the_checkpoints_is_refused() -> None:
    weights = {"w": torch.ones(4)}
    model = graph([NODE("Mul", ["x", "w"], ["y"])], weights)
    with pytest.raises(ExportError, match="'w' is not the checkpoint's weight"):
        template_of(model, {"w": torch.ones(4) * 2})


@pytest.mark.parametrize(
    ("state", "text"),
    [({}, "no 'w' any more"), ({"w": torch.ones(5)}, "had shape .4,. and now has .5,.")],
)
def test_another_set_of_weights_is_stale(state: dict[str, torch.Tensor], text: str) -> None:
    weights = {"w": torch.ones(4)}
    template = template_of(graph([NODE("Mul", ["x", "w"], ["y"])], weights), weights)
    with pytest.raises(StaleTemplateError, match=text):
        list(template.fill(state, PrepSessions()))


# --- files --------------------------------------------------------------------------------------


def large() -> tuple[Template, dict[str, torch.Tensor]]:
    weights = {"w": torch.randn(4, 4000), "b": torch.randn(4000), "c": torch.randn(1)}
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"]),
        NODE("Add", ["h", "b"], ["k"]),
        NODE("Mul", ["k", "c"], ["y"]),
    ]
    return template_of(graph(nodes, weights), weights), weights


def test_a_file_written_by_tensor_is_the_file_that_onnx_would_write(tmp_path: Path) -> None:
    template, weights = large()
    path = filled(template, weights, tmp_path / "m.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    read = {init.name: numpy_helper.to_array(init) for init in onnx.load(path).graph.initializer}
    assert read.keys() == weights.keys()
    assert all(np.array_equal(read[name], value.numpy()) for name, value in weights.items())


def test_the_twin_of_a_file_is_small_and_computes_the_same(tmp_path: Path) -> None:
    template, weights = large()
    path = filled(template, weights, tmp_path / "m.onnx")
    twin = tmp_path / "twin.onnx"
    twin.write_bytes(mapped_twin(path))
    assert twin.stat().st_size < 2000
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(twin, x, in_place=True), run(path, x))


def test_the_twin_sees_the_bytes_of_the_file(tmp_path: Path) -> None:
    template, weights = large()
    path = filled(template, weights, tmp_path / "m.onnx")
    content = path.read_bytes()
    place = content.index(weights["b"].numpy().tobytes())
    damaged = content[:place] + torch.full((4000,), 7.0).numpy().tobytes()
    path.write_bytes(damaged + content[len(damaged) :])
    (tmp_path / "twin.onnx").write_bytes(mapped_twin(path))
    x = torch.zeros(1, 4)
    result = run(tmp_path / "twin.onnx", x, in_place=True)
    torch.testing.assert_close(result, torch.full((1, 4000), 7.0) * weights["c"])


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_half_of_a_file_has_no_twin(keep: float, tmp_path: Path) -> None:
    template, weights = large()
    path = filled(template, weights, tmp_path / "m.onnx")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(PublishError, match="damaged"):
        mapped_twin(path)


def test_a_tensor_of_another_shape_is_not_written() -> None:
    template, weights = large()
    wrong = (torch.zeros(2) for _ in weights)
    with pytest.raises(PublishError, match="should be"):
        write_inline(
            io.BytesIO(),
            template.head,
            template.graph,
            template.slots,
            wrong,  # type: ignore[arg-type]
        )
