"""The hash of a set of weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnxport.exporter.weights import weights_sha256

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.integers(-3, 3), max_size=4),
    st.sampled_from(DTYPES),
)
STATES = st.dictionaries(st.text(max_size=5), TENSORS, max_size=5)


@given(STATES, st.randoms(use_true_random=False))
def test_the_order_of_entries_does_not_matter(state: dict[str, Any], random: Any) -> None:
    names = list(state)
    random.shuffle(names)
    assert weights_sha256({name: state[name] for name in names}) == weights_sha256(state)


@given(STATES)
def test_it_is_64_hexadecimal_digits(state: dict[str, Any]) -> None:
    assert re.fullmatch("[0-9a-f]{64}", weights_sha256(state))


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 31),
)
def test_every_single_bit_matters(values: list[float], place: int, bit: int) -> None:
    tensor = torch.tensor(values)
    flipped = tensor.clone()
    bits = flipped.view(torch.int32)
    bits[place % len(values)] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert weights_sha256({"w": tensor}) != weights_sha256({"w": flipped})


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(2)},
        {"w": torch.zeros(2, dtype=torch.int32)},
        {"w": torch.zeros(1, 2)},
        {"w": torch.zeros(3)},
        {"w": torch.tensor([0.0, -0.0])},
        {"w": torch.zeros(2), "v": torch.zeros(0)},
        {},
    ],
)
def test_name_dtype_shape_sign_and_number_of_tensors_matter(other: dict[str, Any]) -> None:
    assert weights_sha256({"w": torch.zeros(2)}) != weights_sha256(other)


def test_how_a_tensor_lies_in_memory_does_not_matter() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    transposed = tensor.t().contiguous().t()
    strided = torch.arange(12.0)[::2].div(2).reshape(2, 3)
    parameter = torch.nn.Parameter(tensor.clone())
    expected = weights_sha256({"w": tensor})
    assert not transposed.is_contiguous()
    for same in (transposed, strided, parameter):
        assert weights_sha256({"w": same}) == expected


def test_entries_that_are_no_tensors_are_left_out() -> None:
    state = {"w": torch.zeros(2)}
    assert weights_sha256(state | {"_extra_state": {"step": 3}}) == weights_sha256(state)


def test_the_hash_of_a_known_state_stays_what_it_is() -> None:
    state = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(3, dtype=torch.int64)}
    assert weights_sha256(state).startswith("eaae088a41e26205")
