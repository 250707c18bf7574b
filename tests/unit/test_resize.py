"""Real rows at other sizes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from onnxport.inputs.resize import current_sizes, lower, negate, resize, take

NAMES = ("batch", "sequence", "width")


@st.composite
def calls(draw: st.DrawFn) -> Any:
    """Tensors whose dynamic axes of one name have one size, and the sizes to bring them to."""
    have = {name: draw(st.integers(1, 5)) for name in NAMES}
    tensors, axes = [], []
    for _ in range(draw(st.integers(1, 3))):
        dims = draw(st.lists(st.sampled_from((*NAMES, None)), max_size=3))
        shape = [draw(st.integers(0, 3)) if name is None else have[name] for name in dims]
        count = int(torch.tensor(shape).prod())
        tensors.append(torch.arange(count).reshape(shape))
        axes.append({axis: name for axis, name in enumerate(dims) if name is not None})
    sizes = draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9)))
    return tensors, tuple(axes), sizes


@given(calls())
def test_each_named_dimension_gets_the_asked_size_and_no_other_changes(call: Any) -> None:
    tensors, axes, sizes = call
    for before, after, dims in zip(tensors, resize(tensors, axes, sizes), axes, strict=True):
        for axis, size in enumerate(before.shape):
            assert after.shape[axis] == sizes.get(dims.get(axis), size)
        assert after.dtype == before.dtype
        assert after.is_contiguous()


@given(calls())
def test_every_row_is_a_row_of_the_original(call: Any) -> None:
    tensors, axes, sizes = call
    for before, after, dims in zip(tensors, resize(tensors, axes, sizes), axes, strict=True):
        expected = before
        for axis, name in dims.items():
            rows = [row % before.shape[axis] for row in range(sizes.get(name, before.shape[axis]))]
            expected = torch.stack([expected.select(axis, row) for row in rows], axis)
        assert torch.equal(after, expected)


@given(calls())
def test_the_sizes_of_what_was_resized_are_those_that_were_asked_for(call: Any) -> None:
    tensors, axes, sizes = call
    used = {name for dims in axes for name in dims.values()}
    wanted = {name: size for name, size in sizes.items() if name in used}
    assert current_sizes(resize(tensors, axes, sizes), axes).items() >= wanted.items()


def test_an_empty_axis_stays_empty() -> None:
    (resized,) = resize([torch.zeros(0, 3)], ({0: "batch"},), {"batch": 4})
    assert resized.shape == (0, 3)


def test_the_original_is_not_touched() -> None:
    tensor = torch.arange(6).reshape(2, 3)
    resized = resize([tensor], ({0: "batch"},), {"batch": 5})
    resized[0].zero_()
    assert torch.equal(tensor, torch.arange(6).reshape(2, 3))


def test_two_axes_of_one_name_grow_together() -> None:
    square = torch.arange(4).reshape(2, 2)
    (resized,) = resize([square], ({0: "n", 1: "n"},), {"n": 3})
    assert resized.tolist() == [[0, 1, 0], [2, 3, 2], [0, 1, 0]]


def test_take_indexes_all_named_axes_alike() -> None:
    square = torch.arange(9).reshape(3, 3)
    assert take(square, [0, 1], torch.tensor([2, 0])).tolist() == [[8, 6], [2, 0]]
    assert torch.equal(take(square, [], torch.tensor([0])), square)


def test_the_current_sizes_are_read_from_the_named_axes() -> None:
    tensors = [torch.zeros(4, 7), torch.zeros(4)]
    assert current_sizes(tensors, ({0: "batch", 1: "sequence"}, {0: "batch"})) == {
        "batch": 4,
        "sequence": 7,
    }
    assert current_sizes(tensors, ({}, {})) == {}


def test_only_floating_point_tensors_change_their_sign() -> None:
    floats, ids, flags = torch.tensor([1.0, -2.0]), torch.tensor([1, 2]), torch.tensor([True])
    negated = negate([floats, ids, flags])
    assert negated[0].tolist() == [-1.0, 2.0]
    assert torch.equal(negated[1], ids)
    assert torch.equal(negated[2], flags)
    assert floats.tolist() == [1.0, -2.0]


def test_repeats_are_no_ties_with_what_they_repeat() -> None:
    scores = torch.tensor([[0.5, -0.25, 0.125]])
    (longer,) = resize([scores], ({1: "sequence"},), {"sequence": 7})
    assert torch.equal(longer[:, :3], scores)
    assert longer.unique().numel() == 7
    assert torch.allclose(longer[0, 3:6], scores[0], rtol=0.02)


def test_masks_and_counts_kept_as_floats_are_repeated_exactly() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    (longer,) = resize([mask], ({1: "sequence"},), {"sequence": 6})
    assert longer.tolist() == [[1.0, 0.0, 1.0] * 2]


def test_the_lowest_row_of_whole_numbers_is_lowered_and_all_else_stays() -> None:
    lengths, mask, x = torch.tensor([5, 3, 7]), torch.tensor([True, False]), torch.randn(2, 2)
    scalar = torch.tensor(4)
    lowered = lower([lengths, mask, x, scalar])
    assert lowered[0].tolist() == [5, 1, 7]
    assert lowered[1] is mask
    assert lowered[2] is x
    assert lowered[3] is scalar
    assert lengths.tolist() == [5, 3, 7]
    ids = torch.tensor([[4, 9, 0], [2, 3, 3]])
    assert lower([ids])[0].tolist() == [[4, 9, 0], [1, 1, 1]]
    assert lower([torch.zeros(0, 2, dtype=torch.long)])[0].shape == (0, 2)
