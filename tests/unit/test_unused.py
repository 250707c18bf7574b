"""Arguments that a function never looks at."""

from __future__ import annotations

from typing import Any

import torch

from onnxport.inputs.unused import unused_tensors, without
from onnxport.tree import Example, flatten

X, LABEL, MASK = torch.randn(4, 3), torch.arange(4), torch.ones(4, dtype=torch.bool)


def test_labels_that_are_unpacked_and_dropped_are_unused() -> None:
    def predict(batch: Any) -> torch.Tensor:
        x, _ = batch
        return x * 2

    assert unused_tensors(predict, Example(((X, LABEL),))) == [(0, 0, 1)]


def test_keys_that_are_not_read_are_unused() -> None:
    example = Example(({"x": X, "label": LABEL, "mask": MASK},))
    unused = unused_tensors(lambda batch: batch["x"].exp(), example)
    assert unused == [(0, 0, "label"), (0, 0, "mask")]
    left = without(example, unused)
    assert [path for path, _ in flatten((left.args, {}))[1]] == [(0, 0, "x")]
    assert torch.equal(left.args[0]["x"], X)


def test_a_mask_that_changes_nothing_here_is_used() -> None:
    def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(~mask[:, None], 0.0)

    assert torch.equal(masked(X, MASK), X)
    assert unused_tensors(masked, Example((X, MASK))) == []


def test_a_tensor_that_is_only_asked_whether_it_is_there_makes_the_same_result() -> None:
    def optional(x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return x if mask is None else x + 1

    assert unused_tensors(optional, Example((X, MASK))) == [(0, 1)]


def test_a_tensor_that_comes_out_again_is_used() -> None:
    assert unused_tensors(lambda x, label: (x * 2, label), Example((X, LABEL))) == []


def test_the_last_tensor_always_stays() -> None:
    constant = torch.zeros(2)
    assert unused_tensors(lambda *_: constant, Example((X, X))) == [(0, 0)]
    assert unused_tensors(lambda _: constant, Example((X,))) == []


def test_very_many_tensors_are_not_tried() -> None:
    assert unused_tensors(lambda *xs: xs[0] + 1, Example((X,) * 17)) == []
