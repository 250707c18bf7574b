"""Optimise a graph without looking at the weights, which are different at the next checkpoint.

Optimisers look at values: adding a bias of zeros is dropped, multiplying by a scale of ones too,
and weights that are equal become one. All that is true of an untrained model and wrong soon after.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx_ir as ir

__all__ = ["optimize_symbolically", "symbolic_weights"]


@contextmanager
def symbolic_weights(model: ir.Model, names: Collection[str]) -> Iterator[None]:
    """Let weights be inputs of the graph for the block: they have a shape and no value.

    Args:
        model: The graph; its weights are initializers again afterwards.
        names: Names of the initializers that are weights.
    """
    graph = model.graph
    inputs = set(graph.inputs)
    weights = [value for name, value in graph.initializers.items() if name in names]
    tensors = [value.const_value for value in weights]
    for value in weights:
        value.const_value = None
        del graph.initializers[str(value.name)]
        if value not in inputs:
            graph.inputs.append(value)
    try:
        yield
    finally:
        made = set(weights)
        kept = [value for value in graph.inputs if value not in made]
        graph.inputs.clear()
        graph.inputs.extend(kept)
        for value, tensor in zip(weights, tensors, strict=True):
            value.const_value = tensor
            if value.uses() or value.is_graph_output():
                graph.register_initializer(value)


def optimize_symbolically(model: ir.Model, names: Collection[str]) -> None:
    """Do what ``torch.onnx.export(optimize=True)`` does, knowing only the weights' shapes.

    Source: ``onnxscript._framework_apis.torch_2_8.optimize`` (onnxscript 0.7).
    """
    # 20 MB that a trainer with a worker need not have in memory.
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    with symbolic_weights(model, names):
        optimizer.optimize_ir(model)
        onnx_fusions.fuse(model)
