"""Which axes may vary, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnxport.errors import ConfigurationError, InputInferenceError
from onnxport.inputs.axes import AxisPlan, Module, declared_axes, infer_axes

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = tuple[torch.Tensor, ...]


def infer(module: Callable[..., Any], *calls: Tensors) -> AxisPlan:
    """Infer with inputs named ``x0``, ``x1`` and outputs ``y0``, ``y1``."""
    count = len(outputs(module, calls[0]))
    names = [f"x{place}" for place in range(len(calls[0]))]
    return infer_axes(probed(module, names, [f"y{p}" for p in range(count)]), calls)


def probed(module: Callable[..., Any], names: list[str], output_names: list[str]) -> Module:
    return Module(
        run=lambda tensors: outputs(module, tensors), names=names, output_names=output_names
    )


def outputs(module: Callable[..., Any], tensors: Tensors) -> Tensors:
    result = module(*tensors)
    return result if isinstance(result, tuple) else (result,)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape) + 1))


# --- a planted batch axis ---------------------------------------------------------------------


def flat_rows(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], size)


def dense(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Mix all other axes with one matrix: they are static."""
    return (flat_rows(x, axis, size) @ normal(size, 3)).tanh()


def pooled(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Average over all other axes: they may have any size, and no output follows them."""
    mean = flat_rows(x, axis, -1).mean(1, keepdim=True)
    return mean * normal(1, 3) + size


def recurrent(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Run along another axis as a recurrent network does: any length, but order counts."""
    along = x.cumsum(1 - axis) if x.ndim > 1 else x
    return flat_rows(along, axis, -1)[:, -1:] * size


@st.composite
def planted(draw: st.DrawFn) -> Any:
    """A shape, the place of its batch axis, the place of the output's and a module."""
    rank = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    axis = draw(st.integers(0, min(rank, 2) - 1))
    shape[axis] = draw(st.one_of(st.integers(1, 12), st.sampled_from(shape)))
    return shape, axis, draw(st.integers(0, 1)), draw(st.sampled_from([dense, pooled, recurrent]))


@given(planted())
def test_a_planted_batch_axis_is_found_wherever_it_stands(case: Any) -> None:
    shape, axis, out_axis, module = case
    size = math.prod(shape) // shape[axis]
    plan = infer(lambda x: module(x, axis, size).movedim(0, out_axis), (normal(*shape),))
    assert plan.inputs == ({axis: "batch"},)
    assert plan.outputs == ({out_axis: "batch"},)
    assert plan.batch == "batch"
    assert plan.warnings == ()
    assert [(item.dim, item.kind) for item in plan.evidence] == [("batch", "probed")]


@given(st.integers(1, 9), st.integers(10, 19), st.integers(0, 9))
def test_an_input_that_has_the_batchs_size_by_accident_stays_static(
    rows: int, features: int, table_rows: int
) -> None:
    table = normal(table_rows or rows, features)
    plan = infer(lambda x, table: table.mean(1) * x.sum(1, True), (normal(rows, features), table))
    # A table that has the size of the batch by accident and varies alone is a dimension of its own.
    alone = plan.inputs[1] == {0: "x1_batch"} and len(table) == rows
    assert plan.inputs == ({0: "batch"}, {0: "x1_batch"} if alone else {})
    assert plan.outputs == ({0: "batch"} | ({1: "x1_batch"} if alone else {}),)
    assert plan.warnings == ()


def test_texts_and_images_of_one_batch_are_two_batches_where_each_varies_alone() -> None:
    plan = infer(lambda text, image: (text @ image.t()).softmax(1), (normal(6, 4), normal(6, 4)))
    assert plan.inputs == ({0: "batch"}, {})  # softmax over the images: these depend on each other
    plan = infer(lambda text, image: text @ image.t(), (normal(6, 4), normal(6, 4)))
    assert plan.inputs == ({0: "batch"}, {0: "x1_batch"})
    assert plan.outputs == ({0: "batch", 1: "x1_batch"},)
    assert plan.batches == ("batch", "x1_batch")


@given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 6))
def test_inputs_that_share_the_batch_vary_together(rows: int, left: int, right: int) -> None:
    plan = infer(
        lambda x, y, scale: (x.sum(1) + y.sum(1), x * scale),
        (normal(rows, left), normal(rows, right), normal(1)),
    )
    assert plan.inputs[:2] == ({0: "batch"}, {0: "batch"})
    assert plan.outputs == ({0: "batch"}, {0: "batch"})
    assert plan.warnings == ()


@given(st.integers(2, 9), st.integers(2, 9))
def test_one_input_of_several_may_have_the_batchs_size_by_accident(
    rows: int, table_rows: int
) -> None:
    x, y, table = normal(rows, 3), normal(rows, 3), normal(table_rows, 3)
    plan = infer(lambda x, y, table: (x + y) @ table.t(), (x, y, table))
    assert plan.inputs[:2] == ({0: "batch"}, {0: "batch"})
    assert plan.outputs[0][0] == "batch"
    assert plan.inputs[2] == ({0: "x2_batch"} if table_rows == rows else {})


def test_a_batch_axis_may_stand_elsewhere_in_another_input() -> None:
    plan = infer(lambda x, y: x + y.t(), (normal(6, 3), normal(3, 6)))
    assert plan.inputs == ({0: "batch"}, {1: "batch"})
    assert plan.outputs == ({0: "batch"},)


@pytest.mark.parametrize("table_rows", [9, 6])
def test_rows_that_look_up_a_table_are_the_batch_and_the_table_is_static(table_rows: int) -> None:
    ids = torch.tensor([3, 1, 4, 1, 5, 2])
    plan = infer(lambda ids, table: table[ids], (ids, normal(table_rows, 2)))
    assert plan.inputs == ({0: "batch"}, {})
    assert plan.outputs == ({0: "batch"},)


def test_results_that_are_integers_are_compared_too() -> None:
    independent = infer(lambda x: (x @ normal(3, 4)).argmax(1), (normal(6, 3),))
    assert independent.inputs == ({0: "batch"},)
    assert independent.warnings == ()
    ranked = infer(lambda x: (x @ normal(3, 4)).argsort(0), (normal(6, 3),))
    assert "depend on each other" in ranked.warnings[0]


def test_rows_with_nan_and_infinity_are_compared_too() -> None:
    x = torch.tensor([[math.nan, 1.0], [math.inf, 2.0], [-math.inf, 3.0], [0.0, 4.0]])
    plan = infer(lambda x: x * 2, (x,))
    assert plan.inputs == ({0: "batch"},)
    assert plan.warnings == ()


# --- what must not be found -------------------------------------------------------------------


def test_a_module_that_accepts_one_size_only_stays_static() -> None:
    plan = infer(lambda x: x.reshape(8, 3), (normal(8, 3),))
    assert plan.inputs == ({},)
    assert plan.outputs == ({},)
    assert plan.batch is None
    assert plan.warnings == ("No batch axis was found: all sizes are static.",)


def test_an_output_that_does_not_follow_any_axis_gives_no_batch() -> None:
    plan = infer(lambda x: x.sum(), (normal(8, 3),))
    assert plan.batch is None


def test_where_no_output_follows_axes_that_take_other_sizes_are_dynamic() -> None:
    plan = infer(lambda x: (x @ normal(3, 2)).sum(), (normal(8, 3),))
    assert [list(axes) for axes in plan.inputs] == [[0]]
    assert plan.outputs == ({},)
    assert [entry.kind for entry in plan.evidence] == ["accepted"]
    assert "other sizes of x0[0] are accepted" in plan.evidence[0].text


def test_axes_of_one_size_that_only_move_together_are_one_dimension() -> None:
    plan = infer(lambda a, b: (a * b).sum(), (normal(8, 1), normal(8, 1)))
    assert plan.inputs[0] == plan.inputs[1] != {}


def test_what_is_only_accepted_is_given_up_where_sizes_are_taken_as_seen() -> None:
    names = ["x0"], ["y0"]
    module = probed(lambda x: x.sum(), *names)
    assert infer_axes(module, [(normal(8, 3),)], as_seen=True).inputs == ({},)


@pytest.mark.parametrize(
    "coupled",
    [
        lambda x: x - x.mean(0),
        lambda x: x.softmax(0),
        lambda x: x.cumsum(0),
        lambda x: x.sort(0).values,
        lambda x: x.roll(1, 0),
    ],
    ids=["mean", "softmax", "cumsum", "sort", "roll"],
)
def test_rows_that_depend_on_each_other_are_accepted_with_a_warning(
    coupled: Callable[..., Any],
) -> None:
    plan = infer(lambda x: coupled(x) @ normal(3, 3), (normal(8, 3),))
    assert plan.inputs == ({0: "batch"},)
    assert plan.batch == "batch"
    assert len(plan.warnings) == 1
    assert "Rows of a batch depend on each other" in plan.warnings[0]
    assert "depend on each other" in plan.evidence[0].text


def test_a_mean_over_the_batch_beside_its_rows_is_a_dependence() -> None:
    plan = infer(lambda x: (x @ normal(3, 3), x.mean()), (normal(8, 3),))
    assert plan.outputs == ({0: "batch"}, {})
    assert "depend on each other" in plan.warnings[0]


def test_axis_one_is_a_batch_only_if_its_rows_are_independent() -> None:
    assert infer(lambda x: x.reshape(4, -1).softmax(1), (normal(4, 6),)).batch is None


def test_output_axes_that_grow_in_another_way_have_a_name_of_their_own() -> None:
    plan = infer(lambda x: x.flatten(), (normal(4, 3),))
    assert plan.inputs == ({0: "batch"},)
    assert plan.outputs == ({0: "y0_dim0"},)


def test_the_users_random_numbers_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    infer(lambda x: x * 2, (normal(8, 3),))
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_can_be_inferred_without_a_call() -> None:
    with pytest.raises(InputInferenceError, match="No call of the model was observed"):
        infer_axes(probed(lambda: (), [], []), [])


# --- sizes that differed ----------------------------------------------------------------------


def test_sizes_that_differed_are_dynamic_and_sizes_that_differed_alike_share_a_name() -> None:
    calls = [(normal(n, s, 4), normal(n, s)) for n, s in ((8, 5), (8, 7), (3, 6))]
    plan = infer(lambda x, mask: (x.sum(2) * mask, mask.sum(1)), *calls)
    assert plan.inputs == ({0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence"})
    assert plan.outputs == ({0: "batch", 1: "sequence"}, {0: "batch"})
    assert plan.batch == "batch"
    assert {item.dim: item.text for item in plan.evidence} == {
        "batch": "x0[0], x1[0] had sizes [3, 8]; 5 real rows, shuffled and repeated to 11: each "
        "row kept its result",
        "sequence": "x0[1], x1[1] had sizes [5, 6, 7]",
    }


def test_height_and_width_of_images_have_their_names() -> None:
    calls = [(normal(2, 3, h, w),) for h, w in ((4, 6), (8, 10))]
    plan = infer(lambda x: x * 2, *calls)
    assert plan.inputs == ({0: "batch", 2: "height", 3: "width"},)
    assert plan.outputs == plan.inputs


def test_a_dimension_without_a_usual_name_is_named_after_its_input() -> None:
    calls = [(normal(2, 3, 4, 5, n), normal(n + 1)) for n in (4, 6)]
    plan = infer(lambda x, y: (x * 2, y.sum()), *calls)
    assert plan.inputs[0][4] == "x0_dim4"


def test_an_output_that_grew_in_another_way_is_named_after_itself() -> None:
    plan = infer(lambda x: torch.cat([x, x]), (normal(2, 3),), (normal(5, 3),))
    assert plan.outputs == ({0: "y0_dim0"},)


def test_two_inputs_whose_first_axes_differed_in_other_ways_get_different_names() -> None:
    calls = [(normal(n, 2), normal(m, 2)) for n, m in ((2, 3), (4, 3), (4, 5))]
    plan = infer(lambda x, y: (x * 2, y * 2), *calls)
    assert plan.inputs == ({0: "batch"}, {0: "x1_dim0"})
    assert plan.outputs == ({0: "batch"}, {0: "x1_dim0"})


def test_a_varied_sequence_leaves_the_batch_to_be_probed() -> None:
    plan = infer(lambda x: x.mean(1), (normal(4, 5, 2),), (normal(4, 7, 2),))
    assert plan.inputs == ({0: "batch", 1: "sequence"},)
    assert plan.outputs == ({0: "batch"},)
    assert [item.kind for item in plan.evidence] == ["probed", "varied"]


def test_a_model_with_a_dynamic_sequence_is_not_called_static() -> None:
    plan = infer(lambda x: x.reshape(4, -1, 2).mean(2), (normal(4, 5, 2),), (normal(4, 7, 2),))
    assert plan.inputs[0][1] == "sequence"
    assert not any("all sizes are static" in warning for warning in plan.warnings)


# --- axes given by the user -------------------------------------------------------------------


def declare(module: Callable[..., Any], example: Tensors, declared: Any) -> AxisPlan:
    names = [f"x{place}" for place in range(len(example))]
    return declared_axes(probed(module, names, ["y0", "y1"]), example, declared)


def test_outputs_follow_the_declared_axes_of_the_inputs() -> None:
    plan = declare(lambda x: (x.sum(1), x.t()), (normal(4, 6),), {"x0": {0: "rows", 1: "columns"}})
    assert plan.inputs == ({0: "rows", 1: "columns"},)
    assert plan.outputs == ({0: "rows"}, {0: "columns", 1: "rows"})
    assert plan.batch == "rows"
    assert [(item.dim, item.kind) for item in plan.evidence] == [
        ("rows", "declared"),
        ("columns", "declared"),
    ]


def test_a_list_of_axes_gets_names_and_its_first_axis_is_the_batch() -> None:
    plan = declare(lambda x, y: (x * 2, y), (normal(4, 6), normal(3)), {"x0": [0, 1]})
    assert plan.inputs == ({0: "batch", 1: "x0_dim1"}, {})
    assert plan.outputs == ({0: "batch", 1: "x0_dim1"}, {})


def test_a_dimension_of_several_inputs_grows_in_all_of_them() -> None:
    plan = declare(
        lambda x, y: (x + y, y), (normal(4), normal(4)), {"x0": {0: "n"}, "x1": {0: "n"}}
    )
    assert plan.outputs == ({0: "n"}, {0: "n"})


def test_declaring_nothing_makes_everything_static() -> None:
    plan = declare(lambda x: (x, x), (normal(4, 2),), {})
    assert plan.inputs == ({},)
    assert plan.batch is None


def test_a_declared_name_that_is_no_tensor_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"\['image'\]; the model has inputs \['x0'\]"):
        declare(lambda x: (x, x), (normal(4),), {"image": {0: "batch"}})


@pytest.mark.parametrize(("dims", "wrong"), [({2: "n"}, 2), ({0: "n", 5: "m"}, 5), ([0, 3], 3)])
def test_a_declared_axis_that_the_input_lacks_is_refused(dims: Any, wrong: int) -> None:
    match = rf"names axis {wrong} of input 'x0', which has 2 axes"
    with pytest.raises(ConfigurationError, match=match):
        declare(lambda x: (x, x), (normal(4, 2),), {"x0": dims})


def test_a_negative_axis_is_refused_and_named() -> None:
    with pytest.raises(ConfigurationError, match="names axis -1 of input 'x0'"):
        declare(lambda x: (x, x), (normal(4, 2),), {"x0": {0: "batch", -1: "sequence"}})


def test_one_name_for_axes_of_different_sizes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'n'"):
        declare(lambda x, y: (x, y), (normal(4), normal(3)), {"x0": {0: "n"}, "x1": {0: "n"}})


def test_a_declared_axis_at_which_the_module_does_not_run_is_named() -> None:
    module = probed(lambda x: x @ normal(3, 2), ["x"], ["y"])
    with pytest.raises(ConfigurationError, match="declares 'feature', but the module does not run"):
        declared_axes(module, (normal(4, 3),), {"x": {1: "feature"}})
