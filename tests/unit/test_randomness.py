"""Naming the submodule that stays random in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onnxport.exporter.flat import FlatModule
from onnxport.pipeline.randomness import first_random_module
from onnxport.tree import flatten


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class AlwaysDropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = inner
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


class Sampled(nn.Module):
    """Gives results in a container, with values that are no tensors and integers that vary."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"kind": "sampled", "ids": (torch.randint(0, 10**9, (9,)), None), "x": x}


class WithIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampler = Sampled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.sampler(x)["ids"][0].sum()


class Spread(nn.Module):
    """Random in its own code only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * torch.rand(1)


class Ragged(nn.Module):
    """A result whose size is random."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1 + int(torch.randint(0, 10**6, ())) % 97, 1)


def named(module: nn.Module, *args: Any) -> str:
    spec, found = flatten((args or (torch.ones(16, 4),), {}))
    flat = FlatModule(module.eval(), spec)
    return first_random_module(flat, [tensor for _, tensor in found])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 4), Noise()), " (first in '1', a Noise)"),
        (nn.Sequential(nn.ReLU(), AlwaysDropping()), " (first in '1', a AlwaysDropping)"),
        (nn.Sequential(Block(nn.ReLU()), Block(Noise())), " (first in '1.inner', a Noise)"),
        (Block(nn.Sequential(Block(Noise()))), " (first in 'inner.0.inner', a Noise)"),
        (nn.Sequential(nn.Linear(4, 4), Spread()), " (first in '1', a Spread)"),
        (WithIds(), " (first in 'sampler', a Sampled)"),
    ],
)
def test_the_innermost_random_module_is_named(module: nn.Module, expected: str) -> None:
    assert named(module) == expected


def test_the_first_of_several_is_named() -> None:
    module = nn.Sequential(nn.ReLU(), Block(AlwaysDropping()), Noise())
    assert named(module) == " (first in '1.inner', a AlwaysDropping)"


def test_a_module_whose_result_has_a_random_size_is_named() -> None:
    assert named(nn.Sequential(nn.ReLU(), Ragged())) == " (first in '1', a Ragged)"


def test_a_part_called_module_keeps_its_name() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Noise()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    assert named(Wrapper()) == " (first in 'module', a Noise)"


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))],
    ids=["linear", "dropout in eval mode"],
)
def test_nothing_is_named_where_nothing_is_random(module: nn.Module) -> None:
    assert named(module) == ""


def test_nothing_is_named_where_the_model_itself_is_random() -> None:
    assert named(Noise()) == ""


def test_results_that_are_not_a_number_are_not_random() -> None:
    class Infinite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x / 0, x * float("nan")])

    assert named(nn.Sequential(Infinite(), nn.ReLU())) == ""


def test_a_compiled_part_is_no_error() -> None:
    compiled = torch.jit.script(nn.Linear(4, 4))
    assert named(nn.Sequential(compiled, Noise())) == " (first in '1', a Noise)"


def test_hooks_and_the_users_random_numbers_stay_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Noise())
    calls: list[int] = []
    handle = module[0].register_forward_hook(lambda *_: calls.append(1))
    before = torch.get_rng_state()
    assert named(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(part._forward_hooks) for part in module.modules()] == [0, 1, 0]
    handle.remove()


def test_hooks_are_removed_when_the_module_raises() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("refused")

    module = nn.Sequential(nn.ReLU(), Failing())
    with pytest.raises(ValueError, match="refused"):
        named(module)
    assert not any(part._forward_hooks for part in module.modules())
