"""Sizes that were seen to vary: which axes go together, and by which steps they grow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onnxport.inputs.dims import Dim, Shapes, grown, size_of
from onnxport.inputs.varied import MAX_UNTIED, STEPS, stepped, untied, varied_dims

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensors = tuple[torch.Tensor, ...]
Places = tuple[tuple[int, int], ...]


def names_of(call: Sequence[torch.Tensor]) -> list[str]:
    return [f"x{place}" for place in range(len(call))]


def shapes_of(module: Callable[..., Any]) -> Shapes:
    """Answer as a probe of the module would: shapes, or ``None`` where it refuses."""

    def shapes(tensors: Tensors) -> tuple[tuple[int, ...], ...] | None:
        try:
            with torch.no_grad():
                result = module(*tensors)
        except (RuntimeError, ValueError, IndexError):
            return None
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(tuple(output.shape) for output in outputs)

    return shapes


def varied(places: Places, step: int = 1) -> Dim:
    return Dim(places=places, kind="varied", text="seen", step=step)


def parts(module: Callable[..., Any], call: Tensors, dim: Dim) -> list[Places]:
    return [part.places for part in untied(shapes_of(module), call, dim, names_of(call))]


# --- which axes go together -------------------------------------------------------------------


@st.composite
def observed(draw: st.DrawFn) -> tuple[list[Tensors], dict[str, list[int]], list[list[Any]]]:
    """Calls, the sizes of each dimension in them, and the dimension of each axis of each input."""
    count = draw(st.integers(1, 4))
    sizes = {
        name: draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)) for name in "abc"
    }
    layout = draw(st.lists(st.lists(st.sampled_from(["a", "b", "c", 2]), max_size=3), max_size=3))
    calls = [
        tuple(torch.zeros([sizes[d][number] if d in sizes else d for d in dims]) for dims in layout)
        for number in range(count)
    ]
    return calls, sizes, layout


@given(observed())
def test_axes_that_differed_alike_are_one_dimension_and_no_other_axis_is_one(case: Any) -> None:
    calls, sizes, layout = case
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, dims in enumerate(layout):
        for axis, name in enumerate(dims):
            if len(set(sizes.get(name, [2]))) > 1:
                groups.setdefault(tuple(sizes[name]), []).append((place, axis))
    dims = varied_dims(calls, names_of(calls[0]))
    assert [dim.places for dim in dims] == [tuple(places) for places in groups.values()]
    assert {dim.kind for dim in dims} <= {"varied"}


@given(observed())
def test_all_observed_sizes_lie_on_the_steps_from_each_other(case: Any) -> None:
    calls, _, _ = case
    for dim in varied_dims(calls, names_of(calls[0])):
        seen = [size_of(call, dim) for call in calls]
        assert dim.step >= 1
        assert all((size - seen[0]) % dim.step == 0 for size in seen)
        differences = [abs(a - b) for a in seen for b in seen if a != b]
        assert dim.step == math.gcd(*differences)


@given(observed())
def test_the_evidence_names_each_axis_and_the_sizes(case: Any) -> None:
    calls, _, _ = case
    for dim in varied_dims(calls, names_of(calls[0])):
        assert all(f"x{place}[{axis}]" in dim.text for place, axis in dim.places)
        assert str(sorted({size_of(call, dim) for call in calls})) in dim.text


def test_one_call_shows_no_variation() -> None:
    assert varied_dims([(torch.zeros(3, 4),)], ["x"]) == []


@given(st.integers(1, 4), st.integers(1, 12))
def test_a_call_grows_at_all_places_of_a_dimension_with_values_that_it_had(
    size: int, new: int
) -> None:
    call = (torch.arange(size * 3).reshape(size, 3), torch.arange(size), torch.arange(5))
    bigger = grown(call, ((0, 0), (1, 0)), new)
    assert [x.shape for x in bigger] == [(new, 3), (new,), (5,)]
    assert all(row in call[0].tolist() for row in bigger[0].tolist())
    assert bigger[1].tolist() == [number % size for number in range(new)]
    assert bigger[2] is call[2]


# --- axes that were equal, but need not be ----------------------------------------------------


IMAGES = (torch.randn(2, 3, 32, 32),)
SQUARE: Places = ((0, 2), (0, 3))


def test_height_and_width_of_square_images_are_two_dimensions() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    dims = untied(shapes_of(module), IMAGES, varied(SQUARE, 4), ["image"])
    assert [dim.places for dim in dims] == [((0, 2),), ((0, 3),)]
    assert "image[2] also changes alone" in dims[0].text
    assert "image[3] also changes alone" in dims[1].text
    assert [(dim.kind, dim.step) for dim in dims] == [("varied", 4)] * 2


def test_height_and_width_that_must_be_equal_stay_one_dimension() -> None:
    dim = varied(SQUARE)
    assert untied(shapes_of(lambda x: x + x.transpose(2, 3)), IMAGES, dim, ["x"]) == [dim]


def test_ids_and_mask_of_one_length_stay_one_dimension() -> None:
    embedding = nn.Embedding(10, 4)
    ids, mask = torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6)
    call, dim = (ids, mask), varied(((0, 1), (1, 1)), 2)
    found = untied(
        shapes_of(lambda ids, mask: embedding(ids) * mask[..., None]), call, dim, ["ids", "mask"]
    )
    assert found == [dim]


def test_a_mask_that_is_cut_to_the_ids_when_too_long_is_no_dimension_of_its_own() -> None:
    embedding = nn.Embedding(10, 4)
    ids, mask = torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6)

    def module(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return embedding(ids) * mask[:, : ids.shape[1], None]

    assert parts(module, (ids, mask), varied(((0, 1), (1, 1)))) == [((0, 1), (1, 1))]


def test_source_and_target_of_a_translation_are_apart_each_with_its_mask() -> None:
    def module(source: Any, source_mask: Any, target: Any, target_mask: Any) -> torch.Tensor:
        memory = (source * source_mask).sum(1, keepdim=True)
        return target * target_mask + memory

    call = tuple(torch.ones(2, 6) for _ in range(4))
    together = varied(tuple((place, 1) for place in range(4)))
    assert parts(module, call, together) == [((0, 1), (1, 1)), ((2, 1), (3, 1))]


def test_three_inputs_that_vary_alone_are_three_dimensions_in_order() -> None:
    call = tuple(torch.ones(2, 6) for _ in range(3))
    together = varied(((0, 1), (1, 1), (2, 1)))
    found = parts(lambda a, b, c: a.sum(1) + b.sum(1) + c.sum(1), call, together)
    assert found == [((0, 1),), ((1, 1),), ((2, 1),)]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=MAX_UNTIED))
def test_every_place_is_in_exactly_one_part(lengths: list[int]) -> None:
    """Inputs that share a number are added up, so they need one length."""

    def module(*inputs: torch.Tensor) -> Tensors:
        groups: dict[int, torch.Tensor] = {}
        for number, x in zip(lengths, inputs, strict=True):
            groups[number] = groups[number] + x if number in groups else x * 2
        return tuple(groups.values())

    call = tuple(torch.ones(2, 6) for _ in lengths)
    places = tuple((place, 1) for place in range(len(lengths)))
    found = parts(module, call, varied(places))
    assert sorted(place for part in found for place in part) == list(places)
    for part in found:
        # No part is split from what it needs: the module accepts it alone, at other sizes.
        if len(found) > 1:
            assert shapes_of(module)(grown(call, part, 7)) is not None
            assert shapes_of(module)(grown(call, part, 5)) is not None


def test_one_axis_and_very_many_axes_are_not_tried_apart() -> None:
    def never(_: Tensors) -> None:
        raise AssertionError("run")

    one = varied(((0, 1),))
    assert untied(never, (torch.ones(2, 6),), one, ["x0"]) == [one]
    call = tuple(torch.ones(2, 6) for _ in range(MAX_UNTIED + 1))
    many = varied(tuple((place, 1) for place in range(MAX_UNTIED + 1)))
    assert untied(never, call, many, names_of(call)) == [many]


# --- by which steps ---------------------------------------------------------------------------


def halving(times: int) -> nn.Module:
    """A network that halves an image and doubles it again, and adds both, as a U-Net does."""

    class Skipping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = x
            for _ in range(times):
                small = nn.functional.max_pool2d(small, 2)
            return x + nn.functional.interpolate(small, scale_factor=2.0**times)

    return Skipping()


@pytest.mark.parametrize("step", [1, 2, 4, 8, 32])
def test_a_network_that_halves_an_image_grows_by_its_step(step: int) -> None:
    call = (torch.zeros(1, 1, 128, 128),)
    dim = varied(((0, 2),), 64)
    found = stepped(shapes_of(halving(int(math.log2(step)))), call, dim)
    assert found.step == step
    assert found.places == dim.places
    assert found.text == ("seen" if step == 1 else f"seen; accepted in steps of {step}")


@given(st.sampled_from(STEPS), st.integers(1, 4), st.sampled_from([1, 3, 5]))
def test_the_smallest_step_that_is_accepted_is_found(step: int, size: int, odd: int) -> None:
    def module(x: torch.Tensor) -> torch.Tensor:
        if len(x) % step:
            raise ValueError("no multiple")
        return x

    call = (torch.zeros(step * size),)
    assert stepped(shapes_of(module), call, varied(((0, 0),), step * odd)).step == step


def test_a_step_that_is_no_power_of_two_is_kept_as_it_was_seen() -> None:
    call = (torch.zeros(28),)
    found = stepped(shapes_of(lambda x: x.reshape(-1, 14)), call, varied(((0, 0),), 14))
    assert (found.step, found.text) == (14, "seen; accepted in steps of 14")


def test_a_size_that_may_only_shrink_has_a_step_too() -> None:
    positions = nn.Embedding(8, 2)
    call = (torch.zeros(3, 8),)
    found = stepped(
        shapes_of(lambda x: positions(torch.arange(x.shape[1]))), call, varied(((0, 1),), 4)
    )
    assert found.step == 1


def test_no_step_above_what_was_seen_is_tried() -> None:
    tried: list[int] = []

    def shapes(tensors: Tensors) -> None:
        tried.append(len(tensors[0]))

    dim = varied(((0, 0),), 4)
    found = stepped(shapes, (torch.zeros(8),), dim)
    assert sorted(tried) == [4, 6, 7, 9, 10, 12]
    assert found == replace(dim, text="seen; no other size is accepted with these rows")


def test_a_size_of_nothing_is_not_tried() -> None:
    tried: list[int] = []

    def shapes(tensors: Tensors) -> None:
        tried.append(len(tensors[0]))

    stepped(shapes, (torch.zeros(1),), varied(((0, 0),), 2))
    assert min(tried) >= 1
