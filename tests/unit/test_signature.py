"""Names, dtypes and dims of what goes in and out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxport.errors import ConfigurationError
from onnxport.signature import ModelSignature, TensorSpec

DIMS = st.one_of(st.integers(0, 2**40), st.text(min_size=1, max_size=8))
SPECS = st.builds(
    TensorSpec,
    name=st.text(min_size=1),
    dtype=st.sampled_from(["float32", "int64", "bfloat16", "bool"]),
    shape=st.lists(DIMS, max_size=5).map(tuple),
)


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


@given(SPECS)
def test_a_spec_survives_json(one: TensorSpec) -> None:
    assert TensorSpec.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@given(SPECS)
def test_dynamic_axes_are_exactly_the_named_dims(one: TensorSpec) -> None:
    for axis, size in enumerate(one.shape):
        assert one.dynamic_axes.get(axis) == (size if isinstance(size, str) else None)
    assert all(axis < len(one.shape) for axis in one.dynamic_axes)


def test_a_tensor_needs_a_name() -> None:
    with pytest.raises(ConfigurationError, match="needs a name, got ''"):
        spec("")


def test_a_negative_size_is_refused_and_zero_is_not() -> None:
    assert spec("x", 0).shape == (0,)
    with pytest.raises(ConfigurationError, match=r"'x' must not be negative, got \('batch', -1\)"):
        spec("x", "batch", -1)


def test_a_signature_gives_the_axes_of_each_tensor_in_order() -> None:
    signature = ModelSignature(
        inputs=(spec("x", "batch", 3), spec("table", 5)),
        outputs=(spec("y", 2, "batch"),),
    )
    assert signature.input_axes == ({0: "batch"}, {})
    assert signature.output_axes == ({1: "batch"},)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(("x", "x"), ("y",)), (("x",), ("x",)), ((), ("y", "y"))]
)
def test_a_name_that_stands_twice_is_refused(
    inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigurationError, match=r"must be unique, got \['[xy]'\] more than once"):
        ModelSignature(inputs=tuple(map(spec, inputs)), outputs=tuple(map(spec, outputs)))


def test_a_signature_cannot_be_changed() -> None:
    signature = ModelSignature(inputs=(spec("x"),), outputs=(spec("y"),))
    with pytest.raises(dataclasses.FrozenInstanceError, match="inputs"):
        signature.inputs = ()  # type: ignore[misc]
