"""How two ONNX files differ: interface, graph, weights, origin."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxport.exporter.model_facts import ModelFacts, facts_of, read_model, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

__all__ = ["ModelDifference", "WeightDifference", "difference"]

_MOST_ELEMENTS = 1 << 24
"""So many elements of a weight are compared at once: both sides are mapped, and cast to float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDifference:
    """A weight that both models have, and that is another one.

    Args:
        name: Of the initializer.
        max_abs: Largest absolute difference of two elements; ``None``: shapes or dtypes differ.
        relative: Norm of the difference over the norm of the first; ``None`` likewise.
        why: What differs, in words.
    """

    name: str
    max_abs: float | None = None
    relative: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDifference:
    """What is not the same in two models; all empty: they are the same but for their files' bytes.

    Args:
        interface: Inputs, outputs and operator sets that differ, a line each.
        same_graph: The nodes are the same, in the same order, connected in the same way.
        operators: For each operator that there are more or fewer of: how many in either.
        weights: Those that differ, by how much, the largest relative difference first.
        only_first: Weights of the first alone.
        only_second: Weights of the second alone.
        origin: What is noted about them and differs: key, first, second.
    """

    interface: tuple[str, ...] = ()
    same_graph: bool = True
    operators: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: tuple[WeightDifference, ...] = ()
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    origin: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether they compute the same with the same weights."""
        return self.same_graph and not (
            self.interface or self.weights or self.only_first or self.only_second
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"equal": self.equal}


def difference(first: Path, second: Path) -> ModelDifference:
    """Compare two models; nothing is run, and weights are mapped, not loaded.

    Args:
        first: A model.
        second: Another one.

    Raises:
        UnsafeFileError: If one is no model, or would have files read that are not below its folder.
        OSError: If one cannot be read.
    """
    facts = facts_of(first), facts_of(second)
    models = read_model(first), read_model(second)
    arrays = [
        dict(weights_of(path, model)) for path, model in zip((first, second), models, strict=True)
    ]
    both = [name for name in arrays[0] if name in arrays[1]]
    changed = [_weight(name, arrays[0][name], arrays[1][name]) for name in both]
    operators = [Counter(each.operators) for each in facts]
    return ModelDifference(
        interface=tuple(_interface(*facts)),
        same_graph=_structure(models[0]) == _structure(models[1]),
        operators={
            name: (operators[0][name], operators[1][name])
            for name in sorted(operators[0] | operators[1])
            if operators[0][name] != operators[1][name]
        },
        weights=tuple(
            sorted(
                (each for each in changed if each is not None),
                key=lambda each: -(float("inf") if each.relative is None else each.relative),
            )
        ),
        only_first=tuple(name for name in arrays[0] if name not in arrays[1]),
        only_second=tuple(name for name in arrays[1] if name not in arrays[0]),
        origin=_origin(facts[0].origin, facts[1].origin),
    )


def _interface(first: ModelFacts, second: ModelFacts) -> list[str]:
    lines = []
    for kind in ("inputs", "outputs"):
        ours = {spec.name: spec for spec in getattr(first, kind)}
        theirs = {spec.name: spec for spec in getattr(second, kind)}
        for name in dict.fromkeys((*ours, *theirs)):
            mine, other = ours.get(name), theirs.get(name)
            if mine != other:
                said = [
                    "none" if spec is None else f"{spec.dtype}{list(spec.shape)}"
                    for spec in (mine, other)
                ]
                lines.append(f"{kind[:-1]} {name}: {said[0]} / {said[1]}")
    for domain in sorted({*first.opset, *second.opset}):
        versions = first.opset.get(domain), second.opset.get(domain)
        if versions[0] != versions[1]:
            lines.append(f"opset {domain or 'ai.onnx'}: {versions[0]} / {versions[1]}")
    return lines


def _structure(model: onnx.ModelProto) -> str:
    """Return a hash of the nodes; names of inner values do not count, their connections do.

    Within the bodies of branches, loops and functions, names count, too.
    """
    digest = hashlib.sha256()
    names: dict[str, str] = {"": ""}
    for value in (*model.graph.input, *model.graph.initializer):
        names.setdefault(value.name, value.name)

    def canonical(name: str) -> str:
        return names.setdefault(name, f"#{len(names)}")

    for node in model.graph.node:
        inputs = [canonical(name) for name in node.input]
        outputs = [canonical(name) for name in node.output]
        attributes = sorted(each.SerializeToString(deterministic=True) for each in node.attribute)
        digest.update(repr((node.domain, node.op_type, inputs, outputs, attributes)).encode())
    for function in model.functions:
        digest.update(function.SerializeToString(deterministic=True))
    digest.update(repr([canonical(value.name) for value in model.graph.output]).encode())
    return digest.hexdigest()


def _weight(
    name: str, first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]
) -> WeightDifference | None:
    if first.shape != second.shape or first.dtype != second.dtype:
        why = f"{first.dtype}{list(first.shape)} / {second.dtype}{list(second.shape)}"
        return WeightDifference(name=name, why=why)
    if first.dtype == object:  # strings
        same = np.array_equal(first, second)
        return None if same else WeightDifference(name=name, why="texts")
    left, right = first.reshape(-1), second.reshape(-1)
    largest, squares, norm, same = 0.0, 0.0, 0.0, True
    for begin in range(0, left.size, _MOST_ELEMENTS):
        a, b = left[begin : begin + _MOST_ELEMENTS], right[begin : begin + _MOST_ELEMENTS]
        if a.tobytes() == b.tobytes():
            norm += float(np.square(a.astype(np.float64)).sum())
            continue
        same = False
        a, b = a.astype(np.float64), b.astype(np.float64)
        largest = max(largest, float(np.abs(a - b).max()))
        squares += float(np.square(a - b).sum())
        norm += float(np.square(a).sum())
    if same:
        return None
    relative = (squares / norm) ** 0.5 if norm else float("inf")
    return WeightDifference(name=name, max_abs=largest, relative=relative, why="values")


def _origin(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {
        key: (first.get(key, ""), second.get(key, ""))
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    }
