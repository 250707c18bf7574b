"""Options are checked once, when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from onnxport.config import Background, ExportOptions, Inputs, MLflow, Tolerance, Verify
from onnxport.errors import ConfigurationError

FLAT: dict[str, Any] = {
    "core": "auto",
    "inputs": None,
    "opset": None,
    "precision": None,
    "verify": True,
}


@pytest.mark.parametrize("kind", [Inputs, Tolerance, Verify, MLflow, ExportOptions])
def test_defaults_are_legal_and_cannot_be_changed(kind: type) -> None:
    value = kind()
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(value, name, None)


def test_names_may_be_a_list_and_become_a_tuple() -> None:
    assert Inputs(names=["a", "b"]).names == ("a", "b")  # type: ignore[arg-type]
    assert Inputs(output_names=["y"]).output_names == ("y",)  # type: ignore[arg-type]
    assert Inputs(names=()).names == ()


@pytest.mark.parametrize("argument", ["names", "output_names"])
def test_a_single_name_is_refused_with_the_way_to_write_it(argument: str) -> None:
    match = rf"Inputs\({argument}=\) must be a tuple of names.*Write \('image',\)\."
    with pytest.raises(ConfigurationError, match=match):
        Inputs(**{argument: "image"})


@pytest.mark.parametrize("factor", [0.999, 0, -1, math.nan])
def test_a_factor_below_one_is_refused(factor: float) -> None:
    with pytest.raises(ConfigurationError, match=r"Tolerance\(factor=\) must be at least 1, got"):
        Tolerance(factor=factor)


@pytest.mark.parametrize("argument", ["atol", "rtol"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, -math.inf])
def test_a_negative_tolerance_is_refused(argument: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"Tolerance\({argument}=\) must be >= 0, got"):
        Tolerance(**{argument: value})


def test_a_tolerance_of_zero_is_a_tolerance() -> None:
    assert Tolerance(factor=1, atol=0.0, rtol=0.0).atol == 0.0


@pytest.mark.parametrize("providers", [(), "CPUExecutionProvider", ""])
def test_providers_are_auto_or_a_tuple_of_names(providers: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Verify\(providers=\) must be 'auto' or a tuple"):
        Verify(providers=providers)


@pytest.mark.parametrize("sizes", [(), (0,), (4, -1)])
def test_sizes_are_at_least_one(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"batch sizes of at least 1, got \("):
        Verify(sizes=sizes)


def test_lists_in_verify_become_tuples() -> None:
    verify = Verify(sizes=[1, 8], providers=["CPUExecutionProvider"])  # type: ignore[arg-type]
    assert verify.sizes == (1, 8)
    assert verify.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize("alias", ["champion", "v1a", "latest2", "a-b_C9", "v", "x" * 255])
def test_aliases_of_letters_digits_dashes_and_underscores_are_legal(alias: str) -> None:
    assert MLflow(alias=alias).alias == alias


@pytest.mark.parametrize(
    "alias", ["", "a b", "a/b", "größe", "latest", "Latest", "v1", "v007", "V1", "x" * 256, "a\n"]
)
def test_aliases_that_the_registry_refuses_are_refused_at_once(alias: str) -> None:
    with pytest.raises(ConfigurationError, match=r"MLflow\(alias=\) may hold"):
        MLflow(alias=alias)


@pytest.mark.parametrize("name", ["digits", "my model", "größe", "a.b"])
def test_names_without_slash_and_colon_are_legal_in_the_registry(name: str) -> None:
    assert MLflow(register=name).register == name


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", ":", "."])
def test_names_that_the_registry_refuses_are_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigurationError, match="registered model's name must not be"):
        MLflow(register=name)


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    match = r"MLflow\(policy=\) must be one of best, all, end; got 'some'"
    with pytest.raises(ConfigurationError, match=match):
        MLflow(policy="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("min_delta", [-0.1, math.nan])
def test_a_negative_min_delta_is_refused(min_delta: float) -> None:
    with pytest.raises(ConfigurationError, match=r"MLflow\(min_delta=\) must be >= 0"):
        MLflow(min_delta=min_delta)


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("core", "onnx", r"core must be one of auto, dynamo, trace, script, torchscript; got"),
        ("core", None, r"core must be one of .*; got None"),
        ("precision", "float32", r"precision must be one of fp32, fp16, bf16, fp64; got 'float32'"),
        ("opset", 10, r"opset must be a whole number of at least 11, got 10"),
        ("opset", 17.0, r"opset must be a whole number of at least 11, got 17\.0"),
        ("opset", True, r"opset must be a whole number of at least 11, got True"),
        ("opset", "17", r"opset must be a whole number of at least 11, got '17'"),
    ],
)
def test_unknown_choices_are_refused(argument: str, value: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        ExportOptions(**{argument: value})


@pytest.mark.parametrize("core", ["auto", "dynamo", "trace", "script", "torchscript"])
@pytest.mark.parametrize("precision", [None, "fp32", "fp16", "bf16", "fp64"])
def test_every_choice_is_taken(core: Any, precision: Any) -> None:
    options = ExportOptions(core=core, precision=precision, opset=17)
    assert (options.core, options.precision, options.opset) == (core, precision, 17)


@pytest.mark.parametrize("verify", [False, None, 1, "yes"])
def test_nothing_is_ever_published_unproven(verify: Any) -> None:
    with pytest.raises(ConfigurationError, match="nothing unproven is published"):
        ExportOptions.of(**FLAT | {"verify": verify})


def test_flat_arguments_become_options() -> None:
    assert ExportOptions.of(**FLAT) == ExportOptions()
    verify, inputs = Verify(sizes=(1, 3)), Inputs(names=("x",))
    options = ExportOptions.of(**FLAT | {"verify": verify, "inputs": inputs, "opset": 18})
    assert options == ExportOptions(verify=verify, inputs=inputs, opset=18)


@pytest.mark.parametrize("inputs", [{}, ("x",), "x"])
def test_inputs_of_another_type_are_refused_with_the_way_to_write_them(inputs: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"must be Inputs\(\.\.\.\), got \w+\. Write"):
        ExportOptions.of(**FLAT | {"inputs": inputs})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": None}, "threads=. must be a whole number of at least 1; got None"),
        ({"max_workers": 0}, "max_workers=. must be a whole number of at least 1; got 0"),
        ({"max_workers": 1.5}, "max_workers=. must be a whole number"),
        ({"niceness": 20}, "niceness=. must be a whole number from 0 to 19; got 20"),
        ({"niceness": "x"}, "niceness=. must be a whole number from 0 to 19; got 'x'"),
        ({"memory_gb": "8"}, "memory_gb=. must be GiB above 0, or None; got '8'"),
        ({"memory_gb": 0}, "memory_gb=. must be GiB above 0"),
        ({"stage_timeout_s": None}, "stage_timeout_s=. must be seconds above 0; got None"),
        ({"drain_s": -1}, "drain_s=. must be seconds, at least 0; got -1"),
        ({"drain_s": True}, "drain_s=. must be seconds, at least 0; got True"),
    ],
)
def test_a_worker_that_cannot_live_so_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Background(**options)
