"""What is exported of a module, found by name or made by the user."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from onnxport.errors import ConfigurationError, ExportError
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.target import (
    FunctionModule,
    find_target,
    is_method,
    require_target,
    target_text,
)
from onnxport.tree import flatten


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.kind = "pair"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def embed(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.encoder(x).tanh() * scale

    @property
    def width(self) -> int:
        return 3


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pair()


class Softmaxed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(0.5))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels.float() / 255 - self.mean).softmax(-1)


ROWS = torch.randn(5, 4)


@pytest.mark.parametrize("name", ["", "forward"])
def test_the_module_itself(name: str) -> None:
    module = Pair()
    assert find_target(module, name) is module


def test_a_submodule_by_its_dotted_name() -> None:
    module = Outer()
    assert find_target(module, "inner.encoder") is module.inner.encoder
    assert find_target(module, "inner.forward") is module.inner


def test_a_method_runs_in_the_place_of_forward() -> None:
    module = Outer()
    found = find_target(module, "inner.embed")
    assert isinstance(found, FunctionModule)
    assert torch.equal(found(ROWS, scale=3.0), module.inner.embed(ROWS, scale=3.0))
    assert is_method(module, "inner.embed")
    assert not is_method(module, "inner")
    assert not is_method(module, Softmaxed)


@pytest.mark.parametrize(
    "name", ["nothing", "kind", "width", "parameters", "encoder.weight", "a.b"]
)
def test_a_name_of_nothing_that_can_be_called_is_refused_with_the_submodules(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no submodule and no method.*'encoder'"):
        require_target(Pair(), name)


def test_a_method_of_a_submodule_that_is_computed_again_is_found() -> None:
    module = Outer()
    module.inner = checkpoint_wrapper(module.inner)
    found = find_target(module, "inner.embed")
    assert torch.equal(found(ROWS), module.inner._checkpoint_wrapped_module.embed(ROWS))


def test_a_method_of_a_compiled_submodule_is_found() -> None:
    module = Outer()
    module.inner = torch.compile(module.inner)
    found = find_target(module, "inner.embed")
    assert torch.equal(found(ROWS), module.inner._orig_mod.embed(ROWS))


def test_a_class_wraps_the_module() -> None:
    module = Pair()
    found = find_target(module, Softmaxed)
    assert isinstance(found, Softmaxed)
    assert found.model is module


def test_a_function_wraps_the_module_and_follows_it_into_a_copy() -> None:
    found = find_target(Pair(), lambda model: lambda x: model(x) * 2)
    double = copy.deepcopy(found).double()
    assert double(ROWS.double()).dtype is torch.float64


def test_a_wrapper_that_raises_or_gives_nothing_to_call_is_told() -> None:
    def broken(model: nn.Module) -> Any:
        raise KeyError("mean")

    with pytest.raises(ExportError, match=r"broken raised KeyError: 'mean'.*returns a module"):
        find_target(Pair(), broken)
    with pytest.raises(ConfigurationError, match=r"must return a module or a function.*NoneType"):
        find_target(Pair(), lambda _: None)


def test_targets_have_names_in_reports() -> None:
    assert target_text("net.0") == "net.0"
    assert target_text(Softmaxed) == "Softmaxed"


def names_of(target: Any, root: nn.Module, args: tuple[Any, ...]) -> dict[str, str]:
    return FlatModule(find_target(root, target), flatten((args, {}))[0]).weight_names(root)


def test_weights_keep_the_names_of_the_checkpoint() -> None:
    root = Outer()
    state = set(root.state_dict())
    for target in ("", "inner", "inner.embed"):
        assert set(names_of(target, root, (ROWS,)).values()) == state
    wrapped = names_of(Softmaxed, root.inner, (ROWS,))
    assert set(wrapped.values()) == set(root.inner.state_dict())
    assert "module.mean" not in wrapped


def test_a_module_that_has_two_names_keeps_both() -> None:
    root = nn.Module()
    root.a = root.b = nn.Linear(2, 2)
    names = names_of("", root, (ROWS,))
    assert names["module.a.weight"] == "a.weight"
    assert names["module.b.weight"] == "b.weight"
