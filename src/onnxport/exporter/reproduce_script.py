"""The text of ``reproduce.py``: plain torch, so that it can go into a bug report as it is."""

from __future__ import annotations

__all__ = ["BUILD_HERE", "SCRIPT"]

BUILD_HERE = "<<< BUILD THE MODULE HERE"
"""Marks the line that the user fills in when the module could not be saved."""

SCRIPT = '''\
"""Repeat what failed while exporting $title to ONNX.

    python reproduce.py        every step
    python reproduce.py 2      the second one, whose log is 02-*.log

Needs torch and onnxscript$needs.
"""

import collections.abc
import dataclasses
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = $paths  # where the code of the module was found

INPUTS = [  # name, dtype, shape, dynamic axes
$inputs
]
OUTPUTS = [  # name, dynamic axes
$outputs
]
OPSET = $opset
PLAIN = $plain  # False: what is loaded takes and gives tensors already
STEPS = [  # core, how it was asked, what the proof ran when it found the model wrong
$steps
]


def load_inputs():
    with np.load(HERE / "inputs.npz") as data:
        return tuple(
            torch.from_numpy(data[f"arr_{place}"]).view(dtype).reshape(shape)
            for place, (_, dtype, shape, _) in enumerate(INPUTS)
        )


def load_module():
    $load


class Flat(torch.nn.Module):
    """Takes and gives tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *tensors):
        $call


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, collections.abc.Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name, None))


def export_dynamo(module, inputs, path, variant):
    automatic = "automatic dims" in variant
    dims = tuple(
        dict.fromkeys(axes, torch.export.Dim.AUTO) if automatic else axes for *_, axes in INPUTS
    )
    torch.onnx.export(
        Flat(module).eval(),
        inputs,
        path,
        dynamo=True,
        dynamic_shapes=(dims,),
        input_names=[name for name, *_ in INPUTS],
        output_names=[name for name, _ in OUTPUTS],
        opset_version=OPSET,
        optimize="not optimised" not in variant,
    )


def export_trace(module, inputs, path, variant):
    write_torchscript(Flat(module).eval(), inputs, path)


def export_script(module, inputs, path, variant):
    for part in module.modules():  # Lightning's is asked for its trainer, and has none here
        if hasattr(type(part), "_jit_is_scripting"):
            type(part)._jit_is_scripting = True
    if PLAIN:
        module = torch.jit.script(module)
    else:
        module.module = torch.jit.script(module.module)
    flat = Flat(module).eval()
    write_torchscript(torch.jit.trace(flat, inputs, check_trace=False), inputs, path)


def write_torchscript(flat, inputs, path):
    torch.onnx.export(
        flat,
        inputs,
        path,
        dynamo=False,
        dynamic_axes={name: axes for name, *_, axes in (*INPUTS, *OUTPUTS) if axes},
        input_names=[name for name, *_ in INPUTS],
        output_names=[name for name, _ in OUTPUTS],
        opset_version=min(OPSET, 20),
    )


ROWS = {
    "negated": lambda tensor: -tensor if tensor.is_floating_point() else tensor,
    "scaled": lambda tensor: tensor * 8.0 if tensor.is_floating_point() else tensor,
    "shuffled": lambda tensor: tensor.flip(-1) if tensor.ndim > 1 else tensor,
}


def compare(module, inputs, path, sizes, rows):
    """Run the model as the proof did, with the rows repeated to the size of each dimension."""
    import onnxruntime

    fed = []
    for tensor, (_, _, _, axes) in zip(inputs, INPUTS):
        for axis, name in axes.items():
            size = sizes.get(name, tensor.shape[axis] + 1)
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        fed.append(ROWS.get(rows, lambda tensor: tensor)(tensor))
    session = onnxruntime.InferenceSession(path)
    for value in (*session.get_inputs(), *session.get_outputs()):
        print(value.name, value.type, value.shape)
    names = [name for name, *_ in INPUTS]
    known = {value.name for value in session.get_inputs()}
    got = session.run(
        [name for name, _ in OUTPUTS],
        {name: tensor.numpy() for name, tensor in zip(names, fed) if name in known},
    )
    expected = Flat(module)(*(tensor.clone() for tensor in fed))
    for actual, tensor in zip(got, expected):
        torch.testing.assert_close(torch.from_numpy(actual), tensor, rtol=1e-3, atol=1e-4)


def run(core, variant, proof):
    module, inputs = load_module().eval(), load_inputs()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder) / "model.onnx")
        {"dynamo": export_dynamo, "trace": export_trace, "script": export_script}[core](
            module, inputs, path, variant
        )
        if proof is not None:
            compare(module, inputs, path, *proof)


def main():
    torch.backends.mha.set_fastpath_enabled(False)
    failed = False
    for number in [int(text) for text in sys.argv[1:]] or range(1, len(STEPS) + 1):
        core, variant, proof = STEPS[number - 1]
        print(f"--- {number}: {core} {variant}".rstrip(), flush=True)
        try:
            run(core, variant, proof)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed = True
        else:
            print("This step does not fail here.")
    sys.exit(failed)


if __name__ == "__main__":
    main()
'''
