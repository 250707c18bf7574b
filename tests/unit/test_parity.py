"""The comparison of one output; each test has its wrong twin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnxport.validation.budget import Reference
from onnxport.validation.parity import compare

if TYPE_CHECKING:
    from onnxport.report import OutputError

NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int32, torch.int64)


def judge(
    actual: torch.Tensor,
    expected: torch.Tensor,
    budget: float = 0.0,
    exact: torch.Tensor | None = None,
) -> OutputError:
    reference = Reference(
        expected=expected,
        exact=expected if exact is None else exact,
        budget=budget,
        source="table",
    )
    return compare("y", actual, reference)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.0, -2.0]),
        torch.tensor([NAN, INF, -INF, 0.0]),
        torch.tensor(3.0),
        torch.tensor([1, 2]),
        torch.tensor([True, False]),
        torch.zeros(0),
        torch.zeros(3, 0, dtype=torch.int64),
        torch.full((2,), NAN),
    ],
)
def test_equal_outputs_pass_without_any_budget(tensor: torch.Tensor) -> None:
    error = judge(tensor.clone(), tensor)
    assert error.ok
    assert error.reason == ""
    assert error.max_abs_error == 0.0


def test_zero_and_minus_zero_are_the_same_number() -> None:
    assert judge(torch.tensor([-0.0]), torch.tensor([0.0])).ok


@pytest.mark.parametrize(
    ("actual", "expected"),
    [((3, 1), (1, 3)), ((3,), (3, 1)), ((1,), ()), ((0,), (0, 1)), ((2, 3), (3, 2)), ((2,), (1,))],
)
def test_another_shape_fails_even_where_it_broadcasts(
    actual: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    error = judge(torch.zeros(actual), torch.zeros(expected), budget=INF)
    assert not error.ok
    assert error.max_abs_error == INF
    assert error.reason == f"has shape {actual}, PyTorch gives {expected}"


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.int32, torch.int64),
        (torch.uint8, torch.bool),
        (torch.int64, torch.float32),
    ],
)
def test_another_dtype_fails_even_with_equal_values(
    actual: torch.dtype, expected: torch.dtype
) -> None:
    error = judge(torch.ones(2, dtype=actual), torch.ones(2, dtype=expected), budget=INF)
    assert not error.ok
    names = [str(dtype).removeprefix("torch.") for dtype in (actual, expected)]
    assert error.reason == f"is {names[0]}, PyTorch gives {names[1]}"


@pytest.mark.parametrize(
    ("actual", "expected", "what"),
    [
        ([NAN, 1.0], [1.0, NAN], "NaN"),
        ([NAN, 1.0], [1.0, 1.0], "NaN"),
        ([1.0, 1.0], [NAN, 1.0], "NaN"),
        ([NAN], [INF], "NaN"),
        ([INF], [NAN], "NaN"),
        ([INF, 1.0], [1.0, INF], "infinities"),
        ([INF], [-INF], "infinities"),
        ([INF], [3e38], "infinities"),
        ([3e38], [INF], "infinities"),
    ],
)
def test_nan_and_infinity_must_sit_at_the_same_places(
    actual: list[float], expected: list[float], what: str
) -> None:
    error = judge(torch.tensor(actual), torch.tensor(expected), budget=INF)
    assert not error.ok
    assert error.reason == f"has {what} at other places than PyTorch"
    assert error.max_abs_error == INF


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_difference_within_the_budget_passes_and_one_just_beyond_it_fails(
    dtype: torch.dtype,
) -> None:
    expected, actual = torch.tensor([1.0, 4.0], dtype=dtype), torch.tensor([1.0, 4.5], dtype=dtype)
    assert judge(actual, expected, budget=0.5).ok
    beyond = judge(actual, expected, budget=math.nextafter(0.5, 0.0))
    assert not beyond.ok
    assert beyond.max_abs_error == 0.5
    assert beyond.reason == "differs by 0.5, allowed is 0.5"


def test_a_single_wrong_value_among_many_fails() -> None:
    expected = torch.randn(100, 100)
    actual = expected.clone()
    actual[37, 11] += 1.0
    assert judge(expected.clone(), expected, budget=0.5).ok
    assert not judge(actual, expected, budget=0.5).ok


def test_swapped_rows_fail() -> None:
    expected = torch.randn(4, 3)
    assert not judge(expected.flip(0), expected, budget=1e-3).ok


def test_a_budget_that_is_no_number_lets_nothing_pass() -> None:
    assert not judge(torch.ones(1), torch.ones(1), budget=NAN).ok


def test_the_difference_is_measured_to_the_exact_result_and_not_to_pytorchs() -> None:
    expected, exact = torch.tensor([1.0]), torch.tensor([1.25], dtype=torch.float64)
    error = judge(torch.tensor([1.5]), expected, budget=0.25, exact=exact)
    assert error.ok
    assert error.max_abs_error == 0.25
    assert not judge(torch.tensor([0.5]), expected, budget=0.5, exact=exact).ok


def test_places_where_only_pytorchs_precision_overflows_are_left_out() -> None:
    expected = torch.tensor([INF, 1.0], dtype=torch.float16)
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert judge(expected.clone(), expected, exact=exact).ok
    wrong = torch.tensor([INF, 2.0], dtype=torch.float16)
    assert not judge(wrong, expected, exact=exact).ok


@pytest.mark.parametrize("value", [NAN, INF])
def test_where_only_float64_has_no_number_pytorchs_own_result_counts(value: float) -> None:
    expected, exact = torch.tensor([1.0]), torch.tensor([value], dtype=torch.float64)
    assert judge(torch.tensor([1.0]), expected, budget=0.5, exact=exact).ok
    assert not judge(torch.tensor([9.0]), expected, budget=0.5, exact=exact).ok


def test_neighbours_of_unsigned_integers_differ_by_one() -> None:
    actual, expected = (torch.tensor([v], dtype=torch.uint8) for v in (250, 251))
    for error in (judge(actual, expected), judge(expected, actual)):
        assert not error.ok
        assert error.max_abs_error == 1.0
    assert judge(actual, expected, budget=1.0).ok


def test_unsigned_integers_do_not_wrap_around() -> None:
    actual, expected = (torch.tensor([v], dtype=torch.uint8) for v in (255, 0))
    assert judge(actual, expected).max_abs_error == 255.0


def test_truth_values_differ_by_one() -> None:
    error = judge(torch.tensor([True, True]), torch.tensor([True, False]))
    assert not error.ok
    assert error.max_abs_error == 1.0


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_integers_pass_only_if_they_are_equal(a: int, b: int) -> None:
    assert judge(torch.tensor([a]), torch.tensor([b])).ok == (a == b)


def test_large_integers_that_differ_by_one_are_told_apart() -> None:
    assert not judge(torch.tensor([2**53]), torch.tensor([2**53 + 1])).ok


@pytest.mark.parametrize("actual", [1 + 0j, 2 + 1j])
def test_complex_outputs_differ_in_either_part(actual: complex) -> None:
    expected = torch.tensor([1 + 1j])
    assert judge(expected.clone(), expected).ok
    error = judge(torch.tensor([actual]), expected, budget=0.5)
    assert not error.ok
    assert error.max_abs_error == pytest.approx(1.0)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=5),
    st.floats(0, 1e3),
)
def test_what_passes_is_within_the_budget_everywhere(
    a: list[float], b: list[float], budget: float
) -> None:
    def near(x: float, y: float) -> bool:
        if math.isfinite(x) and math.isfinite(y):
            return abs(x - y) <= budget
        return repr(x) == repr(y)

    expected = len(a) == len(b) and all(map(near, a, b))
    assert judge(torch.tensor(a), torch.tensor(b), budget).ok == expected


@given(st.sampled_from(INTEGERS), st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_the_error_of_integers_is_the_largest_difference(
    dtype: torch.dtype, values: list[int]
) -> None:
    zeros = torch.zeros(len(values), dtype=dtype)
    assert judge(torch.tensor(values, dtype=dtype), zeros).max_abs_error == max(values)


def test_the_name_and_the_budget_are_told() -> None:
    error = judge(torch.zeros(1), torch.ones(1), budget=0.25)
    assert (error.name, error.budget, error.max_abs_error) == ("y", 0.25, 1.0)
    assert error.reason == "differs by 1, allowed is 0.25"
