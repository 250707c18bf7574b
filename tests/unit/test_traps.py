"""Each trap's way around it computes the same, and gives torch back as it was."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._decomp import decomposition_table
from torch.nn.utils import rnn

from onnxport.exporter.patches import applied, patches_for


class Asks(nn.Module):
    """Asks Python for the length of a tensor and of a list."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1) * len([1, 2])


class Flagged(nn.Module):
    """Decides by a scalar buffer, as layers do that initialise themselves."""

    def __init__(self, started: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("started", torch.tensor(started))
        self.register_buffer("count", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.started and not (self.count + 1 < 2):
            return self.linear(x)
        return x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x if self.calls > 1 else x * 2


def exported(module: nn.Module, *args: torch.Tensor) -> nn.Module:
    return torch.export.export(module, args, strict=False).module()


# --- len --------------------------------------------------------------------------------------


def test_len_of_a_tensor_stays_a_size_in_a_trace_and_len_of_all_else_is_pythons() -> None:
    module = Asks()
    with applied(["symbolic len"], module):
        assert module(torch.zeros(3, 2)).shape == (3, 2)
        traced = torch.jit.trace(module, torch.zeros(3, 2, 2), check_trace=False)
    assert traced(torch.zeros(5, 2, 2)).shape == (5, 4)
    assert "len" not in globals()


def test_only_modules_that_ask_for_len_are_concerned() -> None:
    text = "Axis 0 should be dynamic and is fixed to 3"
    assert "symbolic len" in patches_for(text, nn.Sequential(Asks()))
    assert "symbolic len" not in patches_for(text, nn.Sequential(nn.Linear(1, 1)))


# --- packed sequences -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_packed_outputs_with_a_reader_give_the_same_state(kind: Any) -> None:
    layer, x = kind(3, 4, num_layers=2, batch_first=True), torch.randn(3, 5, 3)
    packed = rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]), batch_first=True)
    plain, before = layer(packed), kind.forward
    with applied(["read packed outputs"], layer):
        output, state = layer(packed)
        assert torch.equal(layer(x)[0], layer(x)[0])
    assert kind.forward is before
    assert torch.equal(output.data, plain[0].data)
    states = zip(state, plain[1], strict=True) if kind is nn.LSTM else [(state, plain[1])]
    assert all(torch.equal(ours, theirs) for ours, theirs in states)


# --- assignment at indices --------------------------------------------------------------------

INDEX = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("index", "value"),
    [
        ((..., INDEX), 3.0),
        ((..., INDEX), torch.randn(4, 5, 2)),
        ((slice(None), INDEX), torch.randn(4, 2, 3)),
        ((slice(None), 1, INDEX), 2.0),
        ((0, slice(None), INDEX), torch.randn(5, 2)),
        ((INDEX, slice(None), INDEX), torch.randn(2, 5)),
        (INDEX, 1.0),
        ((slice(1, 3), INDEX), 1.0),
        ((slice(None), torch.tensor([[0, 1], [2, 3]])), torch.randn(4, 2, 2, 3)),
        (0, 1.0),
        ((torch.ones(4, dtype=torch.bool),), 1.0),
    ],
)
def test_assignments_that_name_every_axis_write_the_same(index: Any, value: Any) -> None:
    plain = torch.zeros(4, 5, 3)
    plain[index] = value
    ours = torch.zeros(4, 5, 3)
    with applied(["full index_put"], nn.Identity()):
        ours[index] = value
    assert torch.equal(ours, plain)
    assert "__setitem__" not in vars(torch.Tensor)


# --- scalars ----------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [True, False])
def test_a_scalar_buffer_is_asked_for_its_value(started: bool) -> None:
    module, x = Flagged(started).eval(), torch.randn(2, 3)
    with pytest.raises(Exception, match="data-dependent"):
        exported(module, x)
    with applied(["known scalars"], module):
        found = exported(module, x)
    assert torch.equal(found(x), module(x))


def test_a_scalar_that_was_written_is_known_no_more() -> None:
    with (
        applied(["known scalars"], module := Counting()),
        pytest.raises(Exception, match="data-dependent"),
    ):
        exported(module, torch.randn(2))


def test_batch_norms_counter_is_no_reason_to_look() -> None:
    text = "Could not guard on data-dependent expression"
    assert "known scalars" not in patches_for(text, nn.BatchNorm1d(3))
    assert "known scalars" in patches_for(text, Flagged())


# --- distances --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("rows", [4, 40])
def test_plain_distances_compute_the_same(p: float, rows: int) -> None:
    a, b = torch.randn(2, 3, 5).double(), torch.randn(2, rows, 5).double()
    plain = torch.cdist(a, b, p)
    known = set(decomposition_table)
    with applied(["plain distances"], nn.Identity()):
        torch.testing.assert_close(torch.cdist(a, b, p), plain)
    assert set(decomposition_table) == known


# --- other packages ---------------------------------------------------------------------------


def test_an_absent_mask_stays_absent_inside_only() -> None:
    masks = pytest.importorskip("transformers.masking_utils")
    before = masks._ignore_bidirectional_mask_sdpa
    with applied(["absent masks"], nn.Identity()):
        assert masks._ignore_bidirectional_mask_sdpa(None, 5)
    assert masks._ignore_bidirectional_mask_sdpa is before


def test_without_a_package_its_patch_changes_nothing() -> None:
    with contextlib.ExitStack() as stack:
        for name in ("symbolic einx", "rows without steps", "batched experts"):
            stack.enter_context(applied([name], nn.Identity()))
        assert torch.zeros(2).sum() == 0
    assert patches_for("anything", nn.Linear(1, 1)) == frozenset()
