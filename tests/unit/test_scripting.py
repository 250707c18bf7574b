"""More of Python than TorchScript's compiler takes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from onnxport.exporter.scripting import rewrite, script

if TYPE_CHECKING:
    from collections.abc import Callable

LONGER = 4
OFFSET = -1.5
MODE = "mean"
X = torch.arange(12.0).reshape(2, 6)


def text_of(function: Callable[..., Any]) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return ast.unparse(rewrite(function, tree))


class Numbers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > LONGER:
            x = x[:, :LONGER]
        if MODE == "mean":
            return x.mean(1) + OFFSET
        return x.sum(1)


def closed_over(width: int) -> nn.Module:
    class Closed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :width]

    return Closed()


class Members(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() not in (2, 3):
            return x
        if x.dim() in [2]:
            return x * 2
        return x


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        LONGER = x.shape[1] // 2  # noqa: N806
        return x[:, :LONGER]


class Recursive(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.missing(x)


@pytest.mark.parametrize("module", [Numbers(), closed_over(3), Members(), Own()])
def test_what_is_compiled_computes_the_same(module: nn.Module) -> None:
    compiled = script(module)
    for x in (X, X[:, :3]):
        assert torch.equal(compiled(x), module(x))


def test_numbers_of_the_file_are_written_out() -> None:
    text = text_of(Numbers.forward)
    assert "x.shape[1] > 4" in text
    assert "'mean' == 'mean'" in text
    assert "-1.5" in text


def test_a_name_that_the_function_assigns_is_its_own() -> None:
    assert "LONGER" in text_of(Own.forward)


def test_membership_is_written_as_comparisons() -> None:
    text = text_of(Members.forward)
    assert "x.dim() != 2 and x.dim() != 3" in text
    assert "x.dim() == 2" in text
    assert " in " not in text


def test_membership_in_what_is_not_constant_stays() -> None:
    def function(x: int, known: list[int]) -> bool:
        return x in known or x in (1, x)

    assert text_of(function).count(" in ") == 2


def test_every_node_keeps_a_position() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(Members.forward)))
    lines = {node.lineno for node in ast.walk(rewrite(Members.forward, tree)) if _is_placed(node)}
    assert lines <= set(range(1, 8))


def _is_placed(node: ast.AST) -> bool:
    return isinstance(node, (ast.expr, ast.stmt))


def test_recurrent_cells_compile_for_the_exporter() -> None:
    compiled = script(nn.GRUCell(3, 4))
    assert "__contains__" not in str(compiled.graph)


def test_a_class_that_does_not_compile_gives_the_same_reason_again() -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(Exception, match="missing") as raised:
            script(Recursive())
        reasons.append(str(raised.value))
    assert reasons[0] == reasons[1]


def test_the_compiler_is_as_before_afterwards() -> None:
    from torch.jit import frontend

    before = frontend.parse_def
    script(Members())
    with pytest.raises(Exception, match="missing"):
        script(Recursive())
    assert frontend.parse_def is before
