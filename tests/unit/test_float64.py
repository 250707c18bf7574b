"""Large parameters are made wide one at a time: what comes out is what a whole copy gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from torch import nn

from onnxport.exporter.flat import FlatModule
from onnxport.pipeline import float64
from onnxport.pipeline.float64 import Float64
from onnxport.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Callable


class Borrowing(nn.Module):
    """Uses its parts' weights in other ways than by calling the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.gate = nn.Parameter(torch.randn(6, 6))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.full((1,), 2.0, dtype=self.gate.dtype)
        hidden = self.normed(x) @ self.gate.T * scale + self.table.weight[0]
        hidden = hidden.to(self.gate) + self.gate.sum(0, keepdim=True)
        return torch.einsum("ni,ji->nj", hidden, self.table.weight) * self.gate.shape[0]


class Writing(nn.Module):
    """Changes a parameter when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.mul_(2.0)
        return x @ self.weight


class Recurrent(nn.Module):
    """Its weights go to one function as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    """Hands its weights to one large function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Language(nn.Module):
    """A GPT-2 with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


ROWS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "weights used by others": (Borrowing, ROWS[0]),
    "lists of weights": (Recurrent, ROWS),
    "attention": (Attention, ROWS),
    "tied": (Language, torch.arange(20).reshape(2, 10)),
}


def flat(module: nn.Module, rows: torch.Tensor) -> FlatModule:
    spec, _ = flatten(((rows,), {}))
    return FlatModule(module.eval(), spec)


@pytest.fixture
def _all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float64, "LARGE_MODULE", 0)
    monkeypatch.setattr(float64, "LARGE_PARAMETER", 0)


@pytest.mark.parametrize("case", list(CASES))
def test_outputs_are_those_of_a_whole_copy(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rows = CASES[case]
    module = flat(make(), rows)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = Float64(module).run([rows])
    monkeypatch.setattr(float64, "LARGE_MODULE", 0)
    monkeypatch.setattr(float64, "LARGE_PARAMETER", 0)
    double = Float64(module)
    found = double.run([rows])
    assert [tensor.dtype for tensor in found] == [torch.float64] * len(found)
    torch.testing.assert_close(found, whole, rtol=0.0, atol=0.0)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.dtype is torch.float32 for tensor in module.parameters())


@pytest.mark.usefixtures("_all_large")
def test_a_module_that_writes_to_its_parameters_is_refused() -> None:
    module = flat(Writing(), torch.ones(2, 4))
    with torch.no_grad(), pytest.raises(TypeError, match="mul_ writes"):
        Float64(module).run([torch.ones(2, 4)])
    assert torch.equal(module.state_dict()[next(iter(module.state_dict()))], torch.ones(4, 4))


@pytest.mark.usefixtures("_all_large")
def test_scripts_are_copied_as_a_whole() -> None:
    rows = torch.randn(3, 6)
    module = flat(torch.jit.script(nn.Linear(6, 2)), rows)
    (found,) = Float64(module).run([rows])
    assert found.dtype is torch.float64
