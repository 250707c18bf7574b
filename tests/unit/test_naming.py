"""Names of inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxport.errors import ConfigurationError
from onnxport.inputs.naming import input_names, output_names

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = ["x", "x_out", "x_1", "output", "input", "größe", "a.b", "", "_", "1", "pixel values"]
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=4), st.integers(0, 3))
REST = st.lists(KEYS, max_size=3).map(tuple)
POSITIONAL = st.tuples(st.just(0), st.integers(0, 4)).flatmap(
    lambda head: REST.map(lambda rest: (*head, *rest))
)
KEYWORD = st.tuples(st.just(1), st.sampled_from(WORDS)).flatmap(
    lambda head: REST.map(lambda rest: (*head, *rest))
)
CALLS = st.lists(POSITIONAL | KEYWORD, unique=True, max_size=6)
RESULTS = st.lists(REST, unique=True, max_size=6)


def forward(x: Any, mask: Any = None, *others: Any, **options: Any) -> Any:
    """A call with every kind of parameter."""
    return x, mask, others, options


def is_valid(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def test_an_argument_has_its_parameters_name_given_by_position_or_by_keyword() -> None:
    assert input_names(forward, [(0, 0), (1, "mask")]) == ("x", "mask")


def test_further_positional_arguments_are_numbered_after_the_starred_parameter() -> None:
    assert input_names(forward, [(0, 0), (0, 2), (0, 3)]) == ("x", "others_0", "others_1")


def test_a_function_without_a_signature_gets_numbered_inputs() -> None:
    assert input_names(min, [(0, 0), (0, 1)]) == ("input_0", "input_1")


def test_a_bound_method_does_not_count_its_self() -> None:
    class Net:
        def forward(self, image: Any) -> Any:
            return image

    assert input_names(Net().forward, [(0, 0)]) == ("image",)


def test_inside_a_mapping_the_key_is_the_name_and_inside_a_list_the_lists_name_and_the_place() -> (
    None
):
    paths = [(0, 0, "image"), (0, 0, "boxes", 1), (0, 1, 0)]
    assert input_names(forward, paths) == ("image", "boxes_1", "mask_0")


def test_names_that_would_meet_are_written_with_their_whole_path() -> None:
    paths = [(0, 0, "left", "ids"), (0, 0, "right", "ids"), (0, 1)]
    assert input_names(forward, paths) == ("x_left_ids", "x_right_ids", "mask")


def test_names_that_still_meet_are_numbered() -> None:
    assert input_names(forward, [(1, "a.b"), (1, "a b")]) == ("a_b", "a_b_1")


@pytest.mark.parametrize(
    ("key", "name"),
    [("pixel values", "pixel_values"), ("größe", "gr_e"), ("3d", "input_3d"), ("", "input")],
)
def test_characters_that_no_name_may_hold_are_replaced(key: str, name: str) -> None:
    assert input_names(forward, [(1, key)]) == (name,)


@given(CALLS)
def test_names_of_any_call_are_valid_and_unique(paths: Sequence[tuple[Any, ...]]) -> None:
    names = input_names(forward, paths)
    assert len(names) == len(paths) == len(set(names))
    assert all(is_valid(name) for name in names)


@given(CALLS)
def test_names_are_the_same_each_time(paths: Sequence[tuple[Any, ...]]) -> None:
    assert input_names(forward, paths) == input_names(forward, list(paths))


@given(CALLS, RESULTS)
@example([(1, "x")], [("x",), ("x_out",)])
@example([(1, "x"), (1, "x_out")], [("x",)])
def test_names_of_any_result_are_valid_unique_and_no_inputs(
    call: Sequence[tuple[Any, ...]], result: Sequence[tuple[Any, ...]]
) -> None:
    taken = input_names(forward, call)
    names = output_names(result, taken)
    assert len(names) == len(result)
    assert all(is_valid(name) for name in names)
    assert len({*taken, *names}) == len(taken) + len(names)


def test_a_single_result_is_output_and_several_are_numbered() -> None:
    assert output_names([()], ["x"]) == ("output",)
    assert output_names([(0,), (1,)], ["x"]) == ("output_0", "output_1")


def test_the_keys_of_a_result_are_its_names() -> None:
    paths = [("answer", "logits"), ("answer", "label"), ("sizes", 0)]
    assert output_names(paths, ["x"]) == ("logits", "label", "sizes_0")


def test_an_output_named_like_an_input_is_told_apart() -> None:
    assert output_names([("image",), ("mask",)], ["image"]) == ("image_out", "mask")


def test_two_outputs_never_meet_when_one_of_them_is_told_apart_from_an_input() -> None:
    names = output_names([("x",), ("x_out",)], ["x"])
    assert len(set(names)) == 2


def test_given_names_win() -> None:
    assert input_names(forward, [(0, 0), (0, 1)], ("image", "mask")) == ("image", "mask")
    assert output_names([()], ["x"], ("logits",)) == ("logits",)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "a"), ()])
def test_given_names_must_be_one_per_tensor_and_different(names: tuple[str, ...]) -> None:
    paths = [(0, 0), (0, 1)]
    with pytest.raises(ConfigurationError, match=r"Inputs\(names=\) must hold 2 different names"):
        input_names(forward, paths, names)
    with pytest.raises(ConfigurationError, match=r"Inputs\(output_names=\) must hold 2 different"):
        output_names(paths, [], names)
