"""Which modules decide by data, and compiling just these."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from onnxport.exporter.control_flow import branches, scripted_parts
from onnxport.exporter.scripting import without_raising_properties

if TYPE_CHECKING:
    from collections.abc import Iterator

Scripted = torch.jit.ScriptModule


# --- modules that decide by data --------------------------------------------------------------


class IfOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class IfOnASize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 4:
            return x[:4]
        return x


class ElseIfOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x
        elif bool(x.any()):  # noqa: RET505
            return x + 1
        return x - 1


class NotOnValues(nn.Module):
    def forward(self, x: torch.Tensor, flag: bool = True) -> torch.Tensor:
        if not flag:
            return x
        return -x


class AndOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and x.max() > 1:
            return x
        return -x


class WhileOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.norm() > 1:
            x = x / 2
        return x


class ForOverASize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[0])
        for step in range(x.shape[0]):
            total = total * 0.5 + x[step]
        return total


class ForOverRows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[0])
        for _, row in enumerate(x):
            total = total + row
        return total


class IfExpOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class NestedInALoop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            if x.sum() > 0:
                x = x - 1
        return x


DECIDING = [
    *(IfOnValues, IfOnASize, ElseIfOnValues, NotOnValues, AndOnValues, WhileOnValues),
    *(ForOverASize, ForOverRows, IfExpOnValues, NestedInALoop),
]


# --- modules whose questions have one answer for one model ------------------------------------


class Straight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class IfTraining(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x * 2
        return x if not self.training else -x


class IfNone(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            x = x * mask
        return x if mask is None else x + 1


class IfInstance(nn.Module):
    def forward(self, x: Any) -> Any:
        if isinstance(x, tuple) or hasattr(x, "logits") or callable(x):
            return x[0]
        return x


class IfOption(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mode, self.depth, self.options = "sum", 3, {"scale": True}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "mean" and self.depth > 2 and not self.training:
            return x.mean()
        if self.options["scale"] or len(self.options) == 1 or getattr(self, "mode"):  # noqa: B009
            return x * 2
        return x.sum()


class ForOverLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for _, (first, second) in enumerate(zip(self.layers, reversed(self.layers), strict=True)):
            x = first(x) + second(x)
        return x


class ForANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.steps):
            for _ in range(3):
                x = x + 1
        return x


STEADY = [Straight, IfTraining, IfNone, IfInstance, IfOption, ForOverLayers, ForANumber]


@pytest.mark.parametrize("kind", DECIDING)
def test_a_branch_or_loop_that_data_decides_counts(kind: type[nn.Module]) -> None:
    assert branches(kind())


@pytest.mark.parametrize("kind", STEADY)
def test_a_question_with_one_answer_for_one_model_does_not_count(kind: type[nn.Module]) -> None:
    assert not branches(kind())


@pytest.mark.parametrize("kind", [IfOnValues, Straight])
def test_an_inherited_forward_counts_as_ones_own(kind: type[nn.Module]) -> None:
    class Child(kind):  # type: ignore[misc, valid-type]
        pass

    assert branches(Child()) == branches(kind())


def test_only_the_own_forward_counts_and_not_that_of_parts() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = IfOnValues()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x)

    assert not branches(Around())


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1), nn.TransformerEncoderLayer(2, 1)],
    ids=lambda module: type(module).__name__,
)
def test_modules_of_torch_do_not_count(module: nn.Module) -> None:
    assert not branches(module)


def test_a_forward_without_source_does_not_count() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec(  # noqa: S102 - code without a file
        "class Typed(nn.Module):\n    def forward(self, x):\n        return x if x.sum() else -x",
        names,
    )
    assert not branches(names["Typed"]())
    assert not branches(nn.Module())


def test_a_compiled_module_does_not_count() -> None:
    assert not branches(torch.jit.script(IfOnValues()))


def test_an_attribute_that_data_indexes_counts() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flips = [True, False]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.flips[int(x.sum() > 0)]:
                return -x
            return x

    assert branches(Looked())


# --- compiling the parts ----------------------------------------------------------------------


class Refusing(nn.Module):
    """Branches, and does not compile."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = IfOnValues()

    def forward(self, x, *rest, **options):  # noqa: ANN001, ANN201
        return self.inner(x) if x.sum() > -1e9 else {**options}


class Nested(nn.Module):
    """Branches and compiles, around a part that does both too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = IfOnValues()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.max() > 100:
            return x
        return self.inner(x)


def parts(module: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(part)) for name, part in module.named_modules()]


def scripted(module: nn.Module) -> Iterator[str]:
    inside: tuple[str, ...] = ()
    for name, part in module.named_modules():
        if isinstance(part, Scripted) and not name.startswith(inside or ("\0",)):
            inside = (*inside, f"{name}.")
            yield name


def test_only_what_branches_is_compiled_and_put_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), IfOnValues(), nn.Sequential(Straight(), IfOnASize()))
    before = parts(module)
    with scripted_parts(module) as count:
        assert count == 2
        assert list(scripted(module)) == ["1", "2.1"]
        assert [name for name, _ in parts(module)] == [name for name, _ in before]
    assert parts(module) == before


def test_everything_is_put_back_after_an_exception() -> None:
    module = nn.Sequential(IfOnValues(), nn.Sequential(WhileOnValues()))
    before, keys = parts(module), list(module.state_dict())
    with pytest.raises(KeyError, match="export"), scripted_parts(module):
        raise KeyError("export")
    assert parts(module) == before
    assert list(module.state_dict()) == keys


def test_compiled_parts_give_the_same_results_on_both_branches() -> None:
    module = nn.Sequential(nn.Linear(2, 2), IfOnValues(), WhileOnValues(), IfExpOnValues()).eval()
    inputs = [torch.full((3, 2), value) for value in (5.0, -5.0)]
    plain = [module(x) for x in inputs]
    with scripted_parts(module) as count:
        assert count == 3
        for x, expected in zip(inputs, plain, strict=True):
            torch.testing.assert_close(module(x), expected)


def test_a_recorded_run_takes_the_other_branch_too_where_parts_are_compiled() -> None:
    module = nn.Sequential(Straight(), IfOnValues()).eval()
    up, down = torch.ones(2), -torch.ones(2)
    expected = module(down)
    with scripted_parts(module):
        traced = torch.jit.trace(module, (up,))
        assert torch.equal(traced(down), expected)
        assert torch.equal(traced(up), module(up))


def test_the_outermost_part_that_compiles_is_taken() -> None:
    module = nn.Sequential(Nested())
    before = parts(module)
    with scripted_parts(module) as count:
        assert count == 1
        assert list(scripted(module)) == ["0"]
    assert parts(module) == before


def test_below_a_part_that_does_not_compile_its_own_parts_are_tried() -> None:
    module = nn.Sequential(Refusing())
    assert branches(module[0])
    before = parts(module)
    with scripted_parts(module) as count:
        assert count == 1
        assert list(scripted(module)) == ["0.inner"]
    assert parts(module) == before


def test_a_part_that_is_compiled_already_stays() -> None:
    compiled = torch.jit.script(IfOnValues())
    module = nn.Sequential(compiled)
    with scripted_parts(module) as count:
        assert count == 0
        assert module[0] is compiled


def test_a_part_that_stands_in_two_places_is_replaced_in_both() -> None:
    part = IfOnValues()
    module = nn.Sequential(part, part)
    before = parts(module)
    with scripted_parts(module):
        assert isinstance(module[0], Scripted)
        assert isinstance(module[1], Scripted)
    assert parts(module) == before


@pytest.mark.parametrize("module", [nn.Sequential(nn.Linear(2, 2), Straight()), IfOnValues()])
def test_where_no_part_branches_nothing_is_replaced(module: nn.Module) -> None:
    before = parts(module)
    with scripted_parts(module) as count:
        assert count == 0
        assert parts(module) == before


def test_a_copy_keeps_its_parts_while_those_of_the_module_are_compiled() -> None:
    live = nn.Sequential(IfOnValues())
    module = copy.deepcopy(live)
    with scripted_parts(module):
        assert type(live[0]) is IfOnValues


# --- properties that cannot be read -----------------------------------------------------------


class NeedsATrainer(nn.Module):
    @property
    def step(self) -> int:
        raise RuntimeError("not attached to a trainer")

    @property
    def width(self) -> int:
        return 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_property_that_raises_does_not_end_the_compilation() -> None:
    module = nn.Sequential(NeedsATrainer())
    with scripted_parts(module) as count:
        assert count == 1
        assert torch.equal(module(-torch.ones(2)), torch.ones(2))


def test_only_properties_that_raise_are_hidden_and_only_on_the_copy() -> None:
    live = nn.Sequential(NeedsATrainer(), Straight())
    with without_raising_properties(copy.deepcopy(live)) as module:
        assert isinstance(module[0], NeedsATrainer)
        assert module[0].step is None
        assert module[0].width == 2
        assert type(module[1]) is Straight
        assert type(live[0]) is NeedsATrainer
    assert type(module[0]) is NeedsATrainer
    with pytest.raises(RuntimeError, match="not attached"):
        _ = live[0].step
