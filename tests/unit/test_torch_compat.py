"""What is done to torch's private parts is undone, and changes nothing but the time it takes."""

from __future__ import annotations

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from onnxport._torch_compat import operators_read_once


def test_operators_that_are_read_once_are_the_same_and_nobody_shares_them() -> None:
    before = ONNXRegistry.__dict__["from_torchlib"]
    plain = ONNXRegistry.from_torchlib()
    with operators_read_once():
        first = ONNXRegistry().from_torchlib()
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        second = ONNXRegistry.from_torchlib()
        older = ONNXRegistry.from_torchlib(19)
    assert ONNXRegistry.__dict__["from_torchlib"] is before
    counts = {name: len(known) for name, known in second.functions.items()}
    assert counts == {name: len(known) for name, known in plain.functions.items()}
    assert len(first.get_decomps(torch.ops.aten.relu.default)) == counts["aten::relu"] + 1
    assert (second.opset_version, older.opset_version) == (plain.opset_version, 19)
