"""Calls without labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onnxport import OnnxExport
from onnxport.config import Inputs
from onnxport.errors import ConfigurationError
from onnxport.inputs.leave_out import leave_out
from onnxport.tree import Example


def forward(ids: Any, mask: Any = None, labels: Any = None, scale: float = 1.0) -> None:
    """Take arguments."""


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2, 3), {}, Example((1, 2), {})),
        ((1, 2, 3, 0.5), {}, Example((1, 2), {"scale": 0.5})),
        ((1,), {"labels": 3, "scale": 0.5}, Example((1,), {"scale": 0.5})),
        ((1,), {"mask": 2}, Example((1,), {"mask": 2})),
        ((), {"labels": 3}, Example((), {})),
    ],
)
def test_what_comes_after_is_given_by_name(args: Any, kwargs: Any, expected: Example) -> None:
    call = leave_out(Example(args, kwargs), {"labels"}, forward)
    assert (call.args, call.kwargs) == (expected.args, expected.kwargs)


def test_functions_that_take_anything_are_called_as_before() -> None:
    def takes_all(*args: Any, **kwargs: Any) -> None: ...

    call = leave_out(Example((1, 2), {"labels": 3}), {"labels"}, takes_all)
    assert (call.args, call.kwargs) == ((1, 2), {})


def test_names_are_no_string() -> None:
    with pytest.raises(ConfigurationError, match=r"leave_out=\) must be a tuple"):
        OnnxExport(inputs=Inputs(leave_out="labels"))  # type: ignore[arg-type]


def test_tensors_are_left_out_as_they_are() -> None:
    call = leave_out(Example((torch.ones(2), torch.zeros(2)), {}), {"mask"}, forward)
    assert len(call.args) == 1
