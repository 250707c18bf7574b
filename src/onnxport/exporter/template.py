"""The part of a model that stays the same from checkpoint to checkpoint, and how to fill the rest.

Between two checkpoints the weights change and the graph does not. A template is the graph without
its weights, one *slot* for each tensor that the graph wants, and what turns the entries of a
``state_dict`` into these: most are the entry itself, others come out of a small *prep* graph
(a transposed matrix, gates of an LSTM in another order).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from onnxport.errors import ExportError
from onnxport.exporter.frontier import Piece, cut
from onnxport.exporter.tensors import elem_type_of, raw_bytes, same_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from onnxport.exporter.frontier import Evaluate

__all__ = ["Slot", "StaleTemplateError", "Template", "make_template"]


class StaleTemplateError(Exception):
    """Raised where a ``state_dict`` does not fit a template: the module has changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A tensor that the graph wants.

    Args:
        name: Name of the initializer.
        elem_type: ONNX element type.
        dims: Shape.
        source: Name of the ``state_dict`` entry that it is, or ``None`` if a piece makes it.
    """

    name: str
    elem_type: int
    dims: tuple[int, ...]
    source: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return prod(self.dims) * torch_dtype(self.elem_type).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A graph without weights, and how to fill it.

    Args:
        head: A serialised ``ModelProto`` without graph and metadata.
        graph: A serialised ``GraphProto`` without the initializers of the slots.
        slots: What is to be filled in, in the order in which :meth:`fill` gives it.
        pieces: What makes the slots that are no entries.
        entries: Shape of each ``state_dict`` entry that is used.
    """

    head: bytes
    graph: bytes
    slots: tuple[Slot, ...]
    pieces: tuple[Piece, ...]
    entries: Mapping[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Size of the weights in the file in bytes."""
        return sum(slot.nbytes for slot in self.slots)

    def fill(self, state: Mapping[str, torch.Tensor], evaluate: Evaluate) -> Iterator[torch.Tensor]:
        """Yield the tensor of each slot, in order; one piece at a time is in memory.

        Args:
            state: The ``state_dict`` to fill in, on the CPU.
            evaluate: Runs a serialised graph: names and tensors of its inputs -> its outputs.

        Raises:
            StaleTemplateError: If an entry is missing or has another shape.
        """
        self.require_fit(state)
        for slot in self.slots:
            if slot.source is not None:
                yield _entry(state, slot.source, slot.elem_type)
        for piece in self.pieces:
            tensors = [
                _entry(state, source, kind)
                for source, kind in zip(piece.sources, piece.elem_types, strict=True)
            ]
            names = [f"s{place}" for place in range(len(tensors))]
            yield from evaluate(piece.model, names, tensors)

    def require_fit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Refuse a ``state_dict`` that lacks an entry or has one of another shape.

        Raises:
            StaleTemplateError: With the first such entry.
        """
        for name, dims in self.entries.items():
            if name not in state:
                raise StaleTemplateError(f"The checkpoint has no {name!r} any more.")
            if tuple(state[name].shape) != dims:
                raise StaleTemplateError(
                    f"{name!r} had shape {dims} and now has {tuple(state[name].shape)}."
                )


def _entry(state: Mapping[str, torch.Tensor], name: str, elem_type: int) -> torch.Tensor:
    return state[name].detach().to(torch_dtype(elem_type)).contiguous()


def make_template(
    model: ir.Model,
    weights: Mapping[ir.Value, str],
    state: Mapping[str, torch.Tensor],
    evaluate: Evaluate,
) -> Template:
    """Split a graph into what stays and what is filled in.

    Args:
        model: The graph with all its initializers; changed in place.
        weights: Its initializers that are weights -> names in the ``state_dict``.
        state: The ``state_dict`` that the graph was exported with.
        evaluate: Runs a serialised graph: names and tensors of its inputs -> its outputs.

    Raises:
        ExportError: If an initializer that has the name of a weight does not hold it.
    """
    known = {value: source for value, source in weights.items() if source in state}
    for value, source in known.items():
        _require_same(value, state[source])
    pieces, replaced = cut(model, known, state, evaluate)
    slots = [
        Slot(
            name=str(value.name),
            elem_type=int(value.dtype or 0),
            dims=tuple(state[source].shape),
            source=source,
        )
        for value, source in known.items()
        if value.is_graph_output() or any(use.node not in replaced for use in value.uses())
    ]
    slots += [
        Slot(name=name, elem_type=elem_type_of(tensor.dtype), dims=tuple(tensor.shape))
        for piece in pieces
        if piece.sources
        for name, tensor in zip(piece.outputs, piece.made, strict=True)
    ]
    used = [slot.source for slot in slots if slot.source is not None]
    used += [name for piece in pieces for name in piece.sources]
    head, graph = _without_weights(model, known, pieces, replaced)
    return Template(
        head=head,
        graph=graph,
        slots=tuple(slots),
        pieces=tuple(replace(piece, made=()) for piece in pieces if piece.sources),
        entries={name: tuple(state[name].shape) for name in used},
    )


def _require_same(value: ir.Value, entry: torch.Tensor) -> None:
    """Refuse a weight that is not the checkpoint's: a patch or the user's code has changed it.

    Raises:
        ExportError: If it is another tensor.
    """
    tensor = value.const_value
    if tensor is None or tuple(tensor.shape.numpy()) != tuple(entry.shape):
        raise ExportError(f"The initializer {value.name!r} is not the checkpoint's weight.")
    ours = entry.detach().to(torch_dtype(int(tensor.dtype))).contiguous()
    if not same_bytes(ours, tensor):
        raise ExportError(f"The initializer {value.name!r} is not the checkpoint's weight.")


def _without_weights(
    model: ir.Model,
    weights: Mapping[ir.Value, str],
    pieces: list[Piece],
    replaced: set[ir.Node],
) -> tuple[bytes, bytes]:
    """Serialise what stays."""
    graph = model.graph
    positions = [place for place, node in enumerate(graph) if node in replaced]
    tensors = {value: value.const_value for value in weights}
    for value in weights:
        del graph.initializers[str(value.name)]
    try:
        proto = ir.to_proto(model)
    finally:
        for value in weights:
            value.const_value = tensors[value]
            graph.register_initializer(value)
    for place in reversed(positions):
        del proto.graph.node[place]
    for piece in pieces:
        if not piece.sources:
            for name, tensor in zip(piece.outputs, piece.made, strict=True):
                proto.graph.initializer.append(
                    onnx.helper.make_tensor(
                        name,
                        elem_type_of(tensor.dtype),
                        tensor.shape,
                        bytes(raw_bytes(tensor)),
                        raw=True,
                    )
                )
    used = {name for node in proto.graph.node for name in _names_used(node)}
    used |= {value.name for value in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    if len(kept) < len(proto.graph.initializer):
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(copies)
    made = {name for node in proto.graph.node for name in node.output}
    infos = [info for info in proto.graph.value_info if info.name in made]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(infos)
    body = proto.graph.SerializeToString()
    proto.ClearField("graph")
    proto.ClearField("metadata_props")
    return bytes(proto.SerializeToString()), bytes(body)


def _names_used(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, the bodies of its branches and loops included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            names |= {value.name for value in graph.output}
            for inner in graph.node:
                names |= _names_used(inner)
    return names
