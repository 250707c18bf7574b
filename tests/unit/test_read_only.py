"""The reference runs on training's own weights, and nothing may write to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from onnxport._torch_compat import WriteAttemptedError
from onnxport.callbacks.reference import Reference
from onnxport.exporter.module_state import run_borrowed
from onnxport.tree import Example

Write = Callable[[nn.Module], object]

WRITES: dict[str, Write] = {
    "in place": lambda m: m.weight.mul_(2),
    "through .data": lambda m: m.weight.data.add_(1),
    "through a view": lambda m: m.weight[0].zero_(),
    "out=": lambda m: torch.add(m.weight, 1, out=m.weight.detach()),
    "a list": lambda m: torch._foreach_mul_([m.weight, m.bias], 2),
    "copy_": lambda m: m.bias.copy_(torch.ones(3)),
    "setitem": lambda m: m.weight.__setitem__((0, 0), 1.0),
    "initialised": lambda m: nn.init.ones_(m.weight),
}


class Writer(nn.Linear):
    """Writes to its own weights in forward, whatever mode it is in."""

    def __init__(self, write: Write) -> None:
        super().__init__(3, 3)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.write(self)
        return super().forward(x)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_refused_before_it_happens(name: str) -> None:
    module = Writer(WRITES[name])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(WriteAttemptedError, match="would write to a weight"):
        run_borrowed(module, module.state_dict(), (torch.ones(2, 3),), {}, copies=False)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", WRITES)
def test_a_module_that_writes_runs_on_copies(name: str) -> None:
    module = Writer(WRITES[name])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    reference = Reference()
    for _ in range(2):
        outcome, _ = reference.run(module, "", (Example((torch.ones(2, 3),)),), module.state_dict())
        assert outcome is not None
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert torch.equal(outcome.outputs[0], module(torch.ones(2, 3)))


def test_an_embedding_that_renormalises_itself_is_left_alone() -> None:
    module = nn.Embedding(5, 3, max_norm=0.1)
    before = module.weight.detach().clone()
    Reference().run(module, "", (Example((torch.arange(5),)),), module.state_dict())
    assert torch.equal(module.weight, before)


def test_buffers_may_be_written_to_and_other_weights_are_used() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("seen", torch.zeros(()))
    module.register_forward_hook(lambda m, *_: m.seen.add_(1) and None)
    state = {key: value.clone() + 1 for key, value in module.state_dict().items()}
    rows = torch.randn(4, 3)
    result = run_borrowed(module, state, (rows,), {}, copies=False)
    assert module.seen == 0
    other = nn.BatchNorm1d(3)
    other.load_state_dict({key: state[key] for key in other.state_dict()})
    assert torch.equal(result, other.eval()(rows))
