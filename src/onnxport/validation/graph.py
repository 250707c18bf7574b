"""What can be said of a graph without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from onnxport.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from onnxport.signature import ModelSignature, TensorSpec

__all__ = ["check_graph", "nodes_of_sizes"]

_BFLOAT16 = onnx.TensorProto.BFLOAT16


def check_graph(path: Path, signature: ModelSignature) -> int:
    """Check a file with ``onnx.checker`` and against the signature that it claims.

    Axes that are claimed to be dynamic must be symbolic in the graph, one name per dimension, and
    static ones must have their size. Inputs that the module does not use may be missing.

    Args:
        path: The model.
        signature: What it should have.

    Returns:
        The opset version.

    Raises:
        VerificationError: If the checker refuses the file, or names, dtypes or dims differ.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise VerificationError(f"onnx.checker refuses the model: {error}") from error
    model = onnx.load(path, load_external_data=False)
    weights = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    _check_names("inputs", inputs, signature.inputs, may_lack=True)
    _check_names("outputs", list(model.graph.output), signature.outputs, may_lack=False)
    specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    for value in (*inputs, *model.graph.output):
        _check_value(value, specs[value.name])
    return int(next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}))


def _check_names(
    what: str,
    values: list[onnx.ValueInfoProto],
    specs: tuple[TensorSpec, ...],
    *,
    may_lack: bool,
) -> None:
    got = [value.name for value in values]
    expected = [spec.name for spec in specs]
    wanted = [name for name in expected if name in got] if may_lack else expected
    if got != wanted:
        raise VerificationError(f"The graph's {what} are {got}, expected {expected}.")


def _check_value(value: onnx.ValueInfoProto, spec: TensorSpec) -> None:
    tensor = value.type.tensor_type
    dtype = _dtype_name(tensor.elem_type)
    if dtype != spec.dtype:
        raise VerificationError(
            f"{spec.name!r} is {dtype} in the graph and {spec.dtype} in PyTorch."
        )
    dims = tensor.shape.dim
    if not tensor.HasField("shape") or len(dims) != len(spec.shape):
        raise VerificationError(
            f"{spec.name!r} has {len(dims)} axes in the graph, expected {spec.shape}."
        )
    for axis, (dim, expected) in enumerate(zip(dims, spec.shape, strict=True)):
        fixed = dim.HasField("dim_value")
        if isinstance(expected, str) and fixed:
            raise VerificationError(
                f"Axis {axis} ({expected}) of {spec.name!r} should be dynamic and is fixed to "
                f"{dim.dim_value} in the graph."
            )
        if isinstance(expected, int) and (not fixed or dim.dim_value != expected):
            got = dim.dim_value if fixed else (dim.dim_param or "unknown")
            raise VerificationError(
                f"Axis {axis} of {spec.name!r} should be {expected} and is {got} in the graph."
            )


def _dtype_name(elem_type: int) -> str:
    return "bfloat16" if elem_type == _BFLOAT16 else str(tensor_dtype_to_np_dtype(elem_type).name)


_ASK_SIZES = frozenset({"Shape", "Size"})
_FILL = frozenset({"ConstantOfShape", "Expand", "RandomNormal", "RandomUniform"})
"""What makes data of a size."""


def nodes_of_sizes(path: Path) -> frozenset[str]:
    """Return the names of the nodes that compute nothing but sizes of tensors.

    They are few numbers, which providers with a memory of their own leave to the CPU on purpose.
    """
    graph = onnx.load(path, load_external_data=False).graph
    constants = {weight.name for weight in graph.initializer}
    sizes: set[str] = set()
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
            continue
        inputs = {name for name in node.input if name}
        from_sizes = bool(inputs & sizes) and inputs <= sizes | constants
        if node.op_type in _ASK_SIZES or (from_sizes and node.op_type not in _FILL):
            sizes.update(node.output)
            found.add(node.name)
    return frozenset(found)
