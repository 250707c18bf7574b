"""The graph of a model by the modules that it was made of: boxes in boxes, in order.

Both exporters leave the module of each node in the file: ``namespace`` in its metadata, or a name
like ``/encoder/layers.0/MatMul``. Nothing is run, and no weight is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx

__all__ = ["INPUT", "OUTSIDE", "Box", "boxes_of"]

Scope = tuple[tuple[str, str], ...]
"""The modules around a node from the outside in: path and class, ``""`` if it is not known."""

INPUT, OUTSIDE = -1, -2
_DEEPEST = 16
_MOST_NODES = 200_000
_WRAPPER = "module"
"""What the exported module is called within the wrapper that the exporters see."""


@dataclass(slots=True)
class Box:
    """A module, or a run of operators that a module calls itself.

    Args:
        name: Its path in the module that is exported; ``""``: that module, or such a run.
        kind: Its class, or ``""``.
        operators: How many nodes there are of each operator, inner modules included.
        parameters: Number of elements of the weights that are first used here.
        bytes: Their size.
        children: What is in it, in order; nothing for a run of operators.
        sources: Positions of the boxes beside it that it takes values from; :data:`INPUT` for the
            inputs of the graph, :data:`OUTSIDE` for what the module around it is given.
        places: Path of a module in it -> its position.
    """

    name: str = ""
    kind: str = ""
    operators: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    bytes: int = 0
    children: list[Box] = field(default_factory=list)
    sources: set[int] = field(default_factory=set)
    places: dict[str, int] = field(default_factory=dict)

    @property
    def is_module(self) -> bool:
        """Whether it is one, and not a run of operators."""
        return bool(self.name or self.kind or self.children)

    @property
    def shape(self) -> tuple[object, ...]:
        """What it has in common with the other layers of a stack."""
        inner = tuple(child.shape for child in self.children)
        return (self.kind, frozenset(self.operators.items()), inner)


def boxes_of(model: onnx.ModelProto) -> Box:
    """Sort the nodes of a model by module.

    Args:
        model: Any tool's; nodes that name no module belong to the outermost one.

    Returns:
        The module that was exported, with all others in it.
    """
    weights = {tensor.name: _size_of(tensor) for tensor in model.graph.initializer}
    root = Box()
    # Where a value comes from: the way to the box that makes it, as positions from the outside in.
    made: dict[str, tuple[int, ...]] = {each.name: (INPUT,) for each in model.graph.input}
    for node in model.graph.node[:_MOST_NODES]:
        if node.op_type == "Constant":
            continue
        scope = _scope(node)
        way, around = _place(root, scope)
        elements, size = _taken(node.input, weights)
        operators = Counter(_operators(node))
        for box in around:
            box.operators.update(operators)
            box.parameters += elements
            box.bytes += size
        _connect(around, way, (made[name] for name in node.input if name in made))
        made |= dict.fromkeys(node.output, way)
    return root


def _place(root: Box, scope: Scope) -> tuple[tuple[int, ...], list[Box]]:
    """Return the boxes around a node, from the outside in, and the way to the innermost one."""
    if scope and scope[0][0] == "":
        root.kind, scope = root.kind or scope[0][1], scope[1:]
    way, around = [], [root]
    for path, kind in scope:
        children, places = around[-1].children, around[-1].places
        if path not in places:
            places[path] = len(children)
            children.append(Box(path, kind))
        way.append(places[path])
        around.append(children[places[path]])
    own = around[-1].children
    if not own or own[-1].is_module:
        own.append(Box())
    way.append(len(own) - 1)
    around.append(own[-1])
    return tuple(way), around


def _connect(around: list[Box], way: tuple[int, ...], sources: Iterable[tuple[int, ...]]) -> None:
    """Note on the boxes that two ways do not share where their value comes from."""
    for source in sources:
        for depth, (ours, theirs) in enumerate(zip(way, source, strict=False)):
            if ours != theirs:
                around[depth + 1].sources.add(theirs)
                for inner in around[depth + 2 :]:
                    inner.sources.add(OUTSIDE)
                break


def _taken(names: Iterable[str], weights: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return elements and bytes of the weights that nobody has used before."""
    found = [weights.pop(name) for name in names if name in weights]
    return sum(one for one, _ in found), sum(one for _, one in found)


def _scope(node: onnx.NodeProto) -> Scope:
    """Return the modules around a node, the exported one as ``""`` first."""
    space = next((each.value for each in node.metadata_props if each.key == "namespace"), "")
    if space:
        parts = [part.partition(": ")[::2] for part in space.split("/")[:-1]]
        parts = [(path, kind) for path, kind in parts if path]
    else:
        names = node.name.split("/")[1:-1] if node.name.startswith("/") else []
        parts = [(".".join(names[: depth + 1]), "") for depth in range(len(names))]
    return tuple(
        (path.removeprefix(_WRAPPER).removeprefix("."), kind.rpartition(".")[2])
        for path, kind in parts[:_DEEPEST]
        if path == _WRAPPER or path.startswith(f"{_WRAPPER}.")
    )


def _operators(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the operator of a node and those of its branches and loops."""
    waiting = [node]
    while waiting:
        each = waiting.pop()
        yield f"{each.domain}::{each.op_type}" if each.domain else each.op_type
        for attribute in each.attribute:
            graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            waiting += [inner for graph in graphs for inner in graph.node]


def _size_of(tensor: onnx.TensorProto) -> tuple[int, int]:
    from math import prod

    from onnx.helper import tensor_dtype_to_np_dtype

    elements = prod(tensor.dims)
    try:
        return elements, elements * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):  # a type of a later version
        return elements, 0
