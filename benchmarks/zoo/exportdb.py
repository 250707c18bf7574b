"""Torch's own database of what ``torch.export`` should and should not capture, all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch._export.db.examples import all_examples
from torch.utils import _pytree as pytree

from onnxport import Example
from zoo.base import Case

__all__ = ["cases"]

DIMS: dict[str, dict[tuple[int, ...], str]] = {
    # (index of the flat tensor, axis) -> dimension; what may vary by the code of the example.
    "unsupported_operator": {(0, 0): "batch"},
    "class_method": {(0, 0): "batch"},
    "autograd_function": {(0, 0): "batch"},
    "cond_predicate": {(0, 0): "batch"},
    "null_context_manager": {(0, 0): "batch"},
    "dynamic_shape_if_guard": {(0, 1): "width"},
    "type_reflection_method": {(0, 0): "batch"},
    "cond_operands": {(0, 0): "batch"},
    "dynamic_shape_round": {(0, 0): "batch"},
    "dynamic_shape_assert": {(0, 0): "rows"},
    "user_input_mutation": {(0, 0): "batch"},
    "decorator": {(0, 0): "batch", (1, 0): "batch"},
    "fn_with_kwargs": {(index, 0): "batch" for index in range(8)},
    "dynamic_shape_slicing": {(0, 0): "batch"},
    "dynamic_shape_map": {(0, 0): "batch"},
    "dynamic_shape_constructor": {(0, 0): "batch"},
    "nested_function": {(0, 0): "batch"},
    "model_attr_mutation": {(0, 0): "batch"},
    "scalar_output": {(0, 1): "width"},
    "list_unpack": {(0, 0): "batch"},
    "pytree_flatten": {(0, 0): "batch"},
    "list_contains": {},
    "static_if": {(0, 0): "batch"},
    "dictionary": {(0, 0): "batch"},
}
FRESH = {"batch": (1, 5, 9), "width": (3, 5, 9), "rows": (4, 5, 9)}
INEXPRESSIBLE = {
    "tensor_setattr": "it sets an attribute of the input tensor and has no other effect",
}


def cases() -> list[Case]:
    return [_case(name, example) for name, example in sorted(all_examples().items())]


def _case(name: str, example: Any) -> Case:
    given = (tuple(example.example_args), dict(example.example_kwargs or {}))
    flat, _ = pytree.tree_flatten(given)
    tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    dims = DIMS.get(name, {})
    base = {dim: tensors[index].shape[axis] for (index, axis), dim in dims.items()}
    fresh = [{dim: FRESH[dim][i] for dim in base} for i in range(3)]
    kind = type(example.model)

    def build() -> torch.nn.Module:
        return kind()

    def call(**sizes: int) -> Example:
        numbers = iter(range(len(tensors)))

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            index = next(numbers)
            shape = [
                sizes[dims[index, axis]] if (index, axis) in dims else size
                for axis, size in enumerate(leaf.shape)
            ]
            if leaf.is_floating_point():
                return torch.randn(shape, dtype=leaf.dtype)
            return leaf.clone()

        args, kwargs = pytree.tree_map(value, given)
        return Example(args, kwargs)

    return Case(
        name=f"exportdb/{name}",
        build=build,
        call=call,
        observed=(base,),
        fresh=tuple(fresh) if base else ({},),
        inexpressible=INEXPRESSIBLE.get(name, ""),
    )
