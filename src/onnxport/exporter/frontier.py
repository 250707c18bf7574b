"""Cut a graph where it stops to depend on weights alone.

What lies before the cut (transposes, slices, casts of weights) is computed once per checkpoint and
stored; what lies behind it is the graph that runs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnxport.exporter.tensors import elem_type_of, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch

    Evaluate = Callable[[bytes, Sequence[str], Sequence[torch.Tensor]], Sequence[torch.Tensor]]

__all__ = ["Piece", "cut"]

SMALL_BYTES = 2**20
"""What computing beforehand may add to a file. A large weight is never stored twice."""

_NOT_COMPUTED = ("Random", "Multinomial", "Bernoulli", "Sequence", "Optional", "Dropout")

_IR_VERSION = 10
"""What ONNX Runtime has read since 1.18."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A small graph from entries of a ``state_dict`` to tensors that the model's graph wants.

    Args:
        model: Serialised; pieces of one structure are the same bytes.
        sources: Names of the entries; none for what depends on no weight.
        elem_types: As which element types these go in.
        outputs: Names of what comes out, as the model's graph knows them.
        made: What came out for the weights of the export.
    """

    model: bytes
    sources: tuple[str, ...]
    elem_types: tuple[int, ...]
    outputs: tuple[str, ...]
    made: tuple[torch.Tensor, ...]


def cut(
    model: ir.Model,
    weights: Mapping[ir.Value, str],
    state: Mapping[str, torch.Tensor],
    evaluate: Evaluate,
) -> tuple[list[Piece], set[ir.Node]]:
    """Find what can be computed before the graph runs.

    Args:
        model: The graph; what comes out of a piece is named after its entries in it, so that people
            know it again: an exporter only numbers it.
        weights: Its initializers that are weights -> names in the ``state_dict``.
        state: The ``state_dict``.
        evaluate: Runs a serialised graph: names and tensors of its inputs -> its outputs.

    Returns:
        The pieces, and the nodes that are needed no more.
    """
    dependent, constant = _computable(model.graph, weights)
    pieces: list[Piece] = []
    replaced: set[ir.Node] = set()
    taken = _names(model.graph)
    for nodes in _groups(dependent, weights):
        group = _Group(model, nodes, constant, weights)
        piece = group.compute(state, evaluate)
        if piece is not None:
            pieces.append(replace(piece, outputs=group.name_outputs(taken)))
            replaced.update(nodes)
    fixed = [node for node in constant if node.op_type != "Constant"]
    if fixed:
        group = _Group(model, fixed, constant, weights, without=replaced)
        piece = group.compute(state, evaluate) if group.outputs else None
        if piece is not None:
            pieces.append(piece)
            replaced.update(fixed)
    return pieces, replaced | _unused(constant, replaced)


def _names(graph: ir.Graph) -> set[str]:
    """Return all names of a graph and of the bodies of its branches and loops."""
    names = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        names |= {str(value.name) for value in (*node.inputs, *node.outputs) if value is not None}
        for attribute in node.attributes.values():
            for body in _bodies(attribute):
                names |= {str(value.name) for value in (*body.inputs, *body.initializers.values())}
    return names


def _bodies(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def _computable(
    graph: ir.Graph, weights: Mapping[ir.Value, str]
) -> tuple[list[ir.Node], list[ir.Node]]:
    """Return the nodes that depend on weights and constants alone, and on constants alone."""
    on_weights: set[ir.Value] = set(weights)
    known = on_weights | set(graph.initializers.values())
    dependent, constant = [], []
    for node in graph:
        if not _is_plain(node) or any(v is not None and v not in known for v in node.inputs):
            continue
        known.update(node.outputs)
        if any(value in on_weights for value in node.inputs):
            on_weights.update(node.outputs)
            dependent.append(node)
        else:
            constant.append(node)
    return dependent, constant


def _is_plain(node: ir.Node) -> bool:
    graphs = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    return (
        node.domain in {"", "ai.onnx"}
        and not node.op_type.startswith(_NOT_COMPUTED)
        and not any(attr.type in graphs for attr in node.attributes.values())
        and not any(value.is_graph_output() for value in node.outputs)
    )


def _groups(nodes: Sequence[ir.Node], weights: Mapping[ir.Value, str]) -> list[list[ir.Node]]:
    """Put nodes together that share a value, or a weight that is too large to be used twice."""
    made = {value for node in nodes for value in node.outputs}
    leader: dict[ir.Node, ir.Node] = {}
    first: dict[ir.Value, ir.Node] = {}

    def lead(node: ir.Node) -> ir.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in nodes:
        leader[node] = node
        for value in node.inputs:
            # Constants are no tie: they are repeated in every group that needs them.
            if value is None:
                continue
            if value in made or (value in weights and _is_large(value)):
                leader[lead(node)] = lead(first.setdefault(value, node))
        first.update(dict.fromkeys(node.outputs, node))
    groups: dict[ir.Node, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        groups[lead(node)].append(node)
    return list(groups.values())


def _is_large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes > SMALL_BYTES


class _Group:
    """Nodes that are computed together: what goes in, what comes out, and whether it is worth it.

    Args:
        model: The model that they are part of.
        nodes: The nodes, in order.
        constant: Nodes that depend on no weight; what the group needs of them is repeated in it.
        weights: The weights of the model.
        without: Nodes that are gone already: what only they use need not come out.
    """

    def __init__(
        self,
        model: ir.Model,
        nodes: Sequence[ir.Node],
        constant: Sequence[ir.Node],
        weights: Mapping[ir.Value, str],
        without: Collection[ir.Node] = (),
    ) -> None:
        inside = set(nodes)
        self._model = model
        self._weights = weights
        self.outputs = [
            value
            for node in nodes
            for value in node.outputs
            if any(use.node not in inside and use.node not in without for use in value.uses())
        ]
        self._nodes = [*_needed(nodes, constant), *nodes]
        used = dict.fromkeys(v for node in self._nodes for v in node.inputs if v is not None)
        self._sources = [value for value in used if value in weights]
        self._constants = [v for v in used if v not in weights and v.is_initializer()]
        self._shared = [
            value
            for value in self._sources
            if _is_large(value) and any(use.node not in inside for use in value.uses())
        ]

    def name_outputs(self, taken: set[str]) -> tuple[str, ...]:
        """Name what comes out after the entries that go in.

        Args:
            taken: Names that are in use; the new ones are added.
        """
        more = f"+{len(self._sources) - 1}" if len(self._sources) > 1 else ""
        stem = f"{self._weights[self._sources[0]]}{more}.prepared"
        for value in self.outputs:
            numbered = (f"{stem}{number}" for number in count(2))
            value.name = next(name for name in chain([stem], numbered) if name not in taken)
            taken.add(value.name)
        return tuple(str(value.name) for value in self.outputs)

    def compute(self, state: Mapping[str, torch.Tensor], evaluate: Evaluate) -> Piece | None:
        """Return the group as a piece, or ``None`` where the nodes had better stay in the graph."""
        if self._shared or not self.outputs:
            return None
        model = self._serialized()
        sources = tuple(self._weights[value] for value in self._sources)
        kinds = tuple(int(value.dtype or 0) for value in self._sources)
        try:
            tensors = [
                state[name].detach().to(torch_dtype(kind))
                for name, kind in zip(sources, kinds, strict=True)
            ]
            made = evaluate(model, [f"s{place}" for place in range(len(sources))], tensors)
            for tensor in made:
                elem_type_of(tensor.dtype)
        except Exception:  # noqa: BLE001 - whatever it is: the graph as a whole is proven anyway
            return None
        if sum(t.nbytes for t in made) > sum(t.nbytes for t in tensors) + SMALL_BYTES:
            return None
        return Piece(
            model=model,
            sources=sources,
            elem_types=kinds,
            outputs=tuple(str(value.name) for value in self.outputs),
            made=tuple(made),
        )

    def _serialized(self) -> bytes:
        """Serialise with names of its own, so that equal structures are equal bytes."""
        names = {value.name: f"s{place}" for place, value in enumerate(self._sources)}
        names |= {value.name: f"c{place}" for place, value in enumerate(self._constants)}
        made = [value.name for node in self._nodes for value in node.outputs]
        names |= {name: f"v{place}" for place, name in enumerate(made)}
        graph = onnx.GraphProto(name="prep")
        for node in self._nodes:
            proto = ir.serde.serialize_node(node)
            proto.ClearField("name")
            proto.ClearField("metadata_props")
            proto.ClearField("doc_string")
            proto.input[:] = [names.get(name, name) for name in proto.input]
            proto.output[:] = [names.get(name, name) for name in proto.output]
            graph.node.append(proto)
        for value in self._constants:
            if value.const_value is None:
                continue  # the session says what is missing
            tensor = ir.serde.serialize_tensor(value.const_value)
            tensor.name = names[value.name]
            graph.initializer.append(tensor)
        for value in self._sources:
            info = onnx.helper.make_tensor_value_info(
                names[value.name], int(value.dtype or 0), [None] * len(value.shape or ())
            )
            graph.input.append(info)
        for value in self.outputs:
            graph.output.append(onnx.ValueInfoProto(name=names[value.name]))
        opset = onnx.helper.make_opsetid("", self._model.opset_imports.get("", 20))
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())


def _needed(nodes: Sequence[ir.Node], constant: Sequence[ir.Node]) -> list[ir.Node]:
    """Return those of the constant nodes that others need, in order."""
    inside = set(nodes)
    wanted = {value for node in nodes for value in node.inputs if value is not None}
    needed: list[ir.Node] = []
    for node in reversed(constant):
        if node not in inside and any(value in wanted for value in node.outputs):
            needed.append(node)
            wanted.update(value for value in node.inputs if value is not None)
    return needed[::-1]


def _unused(constant: Sequence[ir.Node], replaced: Collection[ir.Node]) -> set[ir.Node]:
    """Return the constant nodes that only replaced ones have used."""
    gone = set(replaced)
    for node in reversed(constant):
        if all(use.node in gone for value in node.outputs for use in value.uses()):
            gone.add(node)
    return gone - set(replaced)
