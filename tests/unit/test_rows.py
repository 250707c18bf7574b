"""More real rows than one call has, and variants that take other branches."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from onnxport.inputs.dims import AxisPlan
from onnxport.inputs.resize import resize, scale, shuffle
from onnxport.inputs.rows import ENOUGH_ROWS, MAX_ROWS, many_rows
from onnxport.tree import flatten, rebuild

Tensors = tuple[torch.Tensor, ...]
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool)


def plan(*axes: int | None, names: dict[int, str] | None = None) -> AxisPlan:
    """A plan whose inputs have the batch at these axes; other dimensions at the first input."""
    inputs: tuple[dict[int, str], ...] = tuple(
        {} if axis is None else {axis: "batch"} for axis in axes
    )
    inputs = (inputs[0] | (names or {}), *inputs[1:])
    return AxisPlan(inputs=inputs, outputs=(), batch="batch", batches=("batch",))


def filled(shape: list[int], dtype: torch.dtype, start: int) -> torch.Tensor:
    """Values that differ everywhere, as far as the type has them."""
    values = torch.arange(start, start + int(torch.tensor(shape).prod())).reshape(shape)
    return values % 2 == 0 if dtype is torch.bool else (values + 1).to(dtype)


@st.composite
def observed(draw: st.DrawFn) -> tuple[list[Tensors], list[int | None]]:
    """Calls that differ in the batch only, and where each input has it; the first has one."""
    count = draw(st.integers(1, 3))
    rests = [draw(st.lists(st.integers(1, 3), max_size=2)) for _ in range(count)]
    axes: list[int | None] = [draw(st.integers(0, len(rest))) for rest in rests]
    if count > 1 and draw(st.booleans()):
        axes[-1] = None
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(count)]
    calls = []
    for number in range(draw(st.integers(1, 4))):
        rows = draw(st.integers(1, 40))
        tensors = []
        for rest, axis, dtype in zip(rests, axes, dtypes, strict=True):
            shape = rest if axis is None else [*rest[:axis], rows, *rest[axis:]]
            tensors.append(filled(shape, dtype, 0 if axis is None else 1000 * number))
        calls.append(tuple(tensors))
    return calls, axes


def rows_of(tensor: torch.Tensor, axis: int) -> list[Any]:
    return [row.tolist() for row in tensor.unbind(axis)]


# --- resizing what stands in trees ------------------------------------------------------------


def trees(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf,
        lambda children: st.one_of(
            st.lists(children, max_size=3),
            st.tuples(children, children),
            st.dictionaries(st.sampled_from("abc"), children, max_size=3),
        ),
        max_leaves=5,
    )


@st.composite
def sized_trees(draw: st.DrawFn) -> tuple[Any, list[dict[int, str]], dict[str, int]]:
    """A tree of tensors, the dynamic axes of each, and a wanted size for each dimension."""
    have = {name: draw(st.integers(1, 5)) for name in ("batch", "sequence")}
    tree = draw(trees(st.lists(st.sampled_from(("batch", "sequence", None)), max_size=3).map(Dims)))
    axes: list[dict[int, str]] = []

    def fill(node: Any) -> Any:
        if isinstance(node, Dims):
            axes.append({axis: name for axis, name in enumerate(node.names) if name})
            return filled([have.get(name, 3) for name in node.names], torch.int64, 0)
        if isinstance(node, dict):
            return {key: fill(child) for key, child in node.items()}
        return type(node)(fill(child) for child in node)

    return fill(tree), axes, {name: draw(st.integers(1, 9)) for name in have}


class Dims:
    def __init__(self, names: list[str | None]) -> None:
        self.names = names


@given(sized_trees())
def test_tensors_of_a_tree_get_exactly_the_wanted_sizes_and_only_rows_that_exist(
    case: Any,
) -> None:
    tree, axes, sizes = case
    spec, found = flatten(tree)
    before = [tensor for _, tensor in found]
    after = resize(before, tuple(axes), sizes)
    for old, new, dims in zip(before, after, axes, strict=True):
        wanted = [
            sizes[dims[axis]] if axis in dims else size for axis, size in enumerate(old.shape)
        ]
        assert list(new.shape) == wanted
        assert set(new.flatten().tolist()) <= set(old.flatten().tolist())
        for axis in dims:
            if len(dims) == 1:
                assert all(row in rows_of(old, axis) for row in rows_of(new, axis))
    assert flatten(rebuild(spec, after))[0] == spec


@given(sized_trees())
def test_growing_and_cutting_back_gives_what_there_was(case: Any) -> None:
    tree, axes, _ = case
    before = [tensor for _, tensor in flatten(tree)[1]]
    have = {d: t.shape[a] for t, dims in zip(before, axes, strict=True) for a, d in dims.items()}
    larger = resize(before, tuple(axes), {name: size + 4 for name, size in have.items()})
    back = resize(larger, tuple(axes), have)
    assert all(torch.equal(a, b) for a, b in zip(before, back, strict=True))


# --- rows of several calls --------------------------------------------------------------------


@given(observed())
def test_the_rows_of_the_first_call_stay_first(case: Any) -> None:
    calls, axes = case
    for old, new, axis in zip(calls[0], many_rows(calls, plan(*axes)), axes, strict=True):
        if axis is None:
            assert torch.equal(new, old)
        else:
            assert torch.equal(new.narrow(axis, 0, old.shape[axis]), old)


@given(observed())
def test_all_inputs_have_one_batch_size_and_enough_rows(case: Any) -> None:
    calls, axes = case
    rows = many_rows(calls, plan(*axes))
    sizes = {x.shape[axis] for x, axis in zip(rows, axes, strict=True) if axis is not None}
    assert len(sizes) == 1
    assert ENOUGH_ROWS <= sizes.pop() <= MAX_ROWS


@given(observed())
def test_nothing_but_the_batch_changes(case: Any) -> None:
    calls, axes = case
    for old, new, axis in zip(calls[0], many_rows(calls, plan(*axes)), axes, strict=True):
        assert new.dtype == old.dtype
        assert new.ndim == old.ndim
        assert [s for a, s in enumerate(new.shape) if a != axis] == [
            s for a, s in enumerate(old.shape) if a != axis
        ]


@given(observed())
def test_enough_rows_of_calls_are_taken_as_they_are_and_in_order(case: Any) -> None:
    calls, axes = case
    total = sum(call[0].shape[axes[0]] for call in calls)
    assume(total >= ENOUGH_ROWS)
    for place, (new, axis) in enumerate(zip(many_rows(calls, plan(*axes)), axes, strict=True)):
        if axis is not None:
            everything = torch.cat([call[place] for call in calls], axis)
            assert torch.equal(new, everything.narrow(axis, 0, min(total, MAX_ROWS)))


@given(observed())
def test_the_observed_calls_are_not_touched(case: Any) -> None:
    calls, axes = case
    before = [[tensor.clone() for tensor in call] for call in calls]
    many_rows(calls, plan(*axes))
    for old, new in zip(before, calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@given(st.integers(1, 2), st.integers(2, 5))
def test_few_rows_become_enough_rows_that_differ(rows: int, features: int) -> None:
    x = filled([rows, features], torch.float32, 0)
    (many,) = many_rows([(x,)], plan(0))
    assert len(many) >= ENOUGH_ROWS
    assert len({tuple(row) for row in many.tolist()}) == len(many)
    assert torch.equal(many, torch.cat([x, x.flip(1), -x, x * 8]))


def test_ids_of_one_row_are_turned_around_and_no_value_is_new() -> None:
    ids, mask = torch.tensor([[3, 1, 4]]), torch.tensor([[True, True, False]])
    many_ids, many_mask = many_rows([(ids, mask)], plan(0, 0))
    assert many_ids.tolist() == [[3, 1, 4], [4, 1, 3], [3, 1, 4], [3, 1, 4]]
    assert many_mask.shape == many_ids.shape
    assert many_mask.dtype == torch.bool


def test_one_row_whose_batch_is_not_the_first_axis_becomes_several() -> None:
    x = torch.tensor([[1.0], [2.0]])
    (many,) = many_rows([(x,)], plan(1))
    assert many.shape == (2, 4)
    assert torch.equal(many[:, :1], x)


def test_calls_of_other_sizes_or_with_another_table_are_left_out() -> None:
    first = (torch.ones(3, 2), torch.zeros(4))
    longer = (torch.ones(3, 5), torch.zeros(4))
    other_table = (torch.ones(3, 2), torch.ones(4))
    fits = (2 * torch.ones(2, 2), torch.zeros(4))
    rows, table = many_rows([first, longer, other_table, fits], plan(0, None))
    assert rows.tolist() == [[1.0, 1.0]] * 3 + [[2.0, 2.0]] * 2
    assert torch.equal(table, first[1])


def test_a_dimension_that_is_no_batch_must_have_the_same_size() -> None:
    first, other = torch.ones(3, 2), torch.ones(3, 4)
    (rows,) = many_rows([(first,), (other,)], plan(0, names={1: "sequence"}))
    assert torch.equal(rows, first)


def test_without_a_batch_the_first_call_stays() -> None:
    calls = [(torch.ones(3, 2),), (torch.zeros(3, 2),)]
    static = AxisPlan(inputs=({1: "sequence"},), outputs=())
    assert many_rows(calls, static) is calls[0]


def test_a_call_of_very_many_rows_is_cut() -> None:
    x = filled([100, 2], torch.float32, 0)
    (many,) = many_rows([(x,)], plan(0))
    assert torch.equal(many, x[:MAX_ROWS])


def test_an_input_with_two_batch_axes_keeps_the_rows_of_the_first_call() -> None:
    calls = [(torch.ones(3, 3),), (torch.zeros(3, 3),)]
    square = AxisPlan(inputs=({0: "batch", 1: "batch"},), outputs=(), batches=("batch",))
    (rows,) = many_rows(calls, square)
    assert torch.equal(rows, calls[0][0])


def test_texts_and_images_with_batches_of_their_own_are_both_filled_up() -> None:
    text, image = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    axes = AxisPlan(
        inputs=({0: "batch"}, {0: "x1_batch"}), outputs=(), batches=("batch", "x1_batch")
    )
    many_text, many_image = many_rows([(text, image)], axes)
    assert len(many_text) >= ENOUGH_ROWS
    assert len(many_image) >= ENOUGH_ROWS


# --- variants of rows -------------------------------------------------------------------------


def test_only_floating_point_values_are_scaled() -> None:
    floats, ids, flags = torch.tensor([1.0, -2.0]), torch.tensor([1, 2]), torch.tensor([True])
    scaled = scale([floats, ids, flags])
    assert scaled[0].tolist() == [8.0, -16.0]
    assert torch.equal(scaled[1], ids)
    assert torch.equal(scaled[2], flags)
    assert floats.tolist() == [1.0, -2.0]


@given(observed())
def test_shuffled_rows_have_the_same_values_in_each_row(case: Any) -> None:
    tensors = case[0][0]
    for old, new in zip(tensors, shuffle(tensors), strict=True):
        assert new.shape == old.shape
        assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)
        if old.ndim < 2:
            assert torch.equal(new, old)
