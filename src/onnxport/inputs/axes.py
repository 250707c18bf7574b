"""Find the axes that may vary, with the evidence for each.

Strongest first: sizes that differed between observed calls; then the permute-and-repeat test, which
runs the module once more on real rows, shuffled and repeated. If every output either stays as it
was or moves along exactly one axis to the new size *with the rows where they should be*, then the
module accepts other batch sizes, that output axis follows, and rows are independent. Sizes that are
equal by accident fail it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from onnxport.errors import ConfigurationError, InputInferenceError
from onnxport.inputs.resize import take
from onnxport.report import AxisEvidence

if TYPE_CHECKING:
    from onnxport.signature import Axes

__all__ = ["AxisPlan", "declared_axes", "infer_axes"]

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[Tensors], Tensors]

BASE_ROWS = 5
"""Rows of the batch that the test is run on; one run of these and one of twice as many and one."""
BATCH = "batch"
IMAGE_RANK = 4
SEQUENCE_RANKS = (2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisPlan:
    """Which axes are dynamic, and why.

    Args:
        inputs: The dynamic axes of each input.
        outputs: The dynamic axes of each output.
        batch: Name of the dimension along which rows are independent or at least accepted.
        evidence: One entry per symbolic dimension.
        warnings: What could not be shown.
    """

    inputs: Axes
    outputs: Axes
    batch: str | None = None
    evidence: tuple[AxisEvidence, ...] = ()
    warnings: tuple[str, ...] = ()


def infer_axes(
    run: Run, calls: Sequence[Tensors], names: Sequence[str], output_names: Sequence[str]
) -> AxisPlan:
    """Find the dynamic axes of a module from calls that it got.

    Args:
        run: Runs the module in eval mode: flat tensors in, flat tensors out.
        calls: Observed calls of one structure; the first one is probed.
        names: Names of the inputs.
        output_names: Names of the outputs.

    Returns:
        The plan; without any dynamic axis when none was found.

    Raises:
        InputInferenceError: If there is no call.
    """
    if not calls:
        raise InputInferenceError("No call of the model was observed, so nothing can be inferred.")
    plan = _varied(run, calls, names, output_names)
    return plan if plan.batch is not None else _probe_batch(run, calls[0], plan, output_names)


def declared_axes(
    run: Run,
    example: Tensors,
    names: Sequence[str],
    output_names: Sequence[str],
    declared: Mapping[str, Mapping[int, str] | Sequence[int]],
) -> AxisPlan:
    """Take the user's axes for the inputs; outputs follow by running two sizes.

    Raises:
        ConfigurationError: If a name is no input or output, or an input has no such axis.
    """
    unknown = sorted(set(declared) - {*names, *output_names})
    if unknown:
        raise ConfigurationError(
            f"dynamic_axes names {unknown!r}; the model has inputs {list(names)!r} and outputs "
            f"{list(output_names)!r}."
        )
    given = {
        name: dict(axes) if isinstance(axes, Mapping) else _named_axes(name, axes)
        for name, axes in declared.items()
        if name in names
    }
    for name, dims in given.items():
        rank = example[names.index(name)].ndim
        wrong = [axis for axis in dims if not 0 <= axis < rank]
        if wrong:
            raise ConfigurationError(
                f"dynamic_axes names axis {wrong[0]} of input {name!r}, which has {rank} axes; "
                "they are counted from 0."
            )
    inputs = tuple(given.get(name, {}) for name in names)
    base = run(example)
    outputs: list[dict[int, str]] = [{} for _ in base]
    evidence = []
    for dim in dict.fromkeys(dim for dims in inputs for dim in dims.values()):
        sizes = {x.shape[a] for x, d in zip(example, inputs, strict=True) for a in d if d[a] == dim}
        if len(sizes) > 1:
            raise ConfigurationError(
                f"dynamic_axes gives {dim!r} to axes of sizes {sorted(sizes)!r} in the example. "
                "Give axes that may differ different names."
            )
        (size,) = sizes
        index = torch.arange(2 * size + 1) % size
        grown = [
            take(x, [axis for axis, name in dims.items() if name == dim], index)
            for x, dims in zip(example, inputs, strict=True)
        ]
        for place, (before, after) in enumerate(zip(base, run(tuple(grown)), strict=True)):
            outputs[place] |= _follows(before, after, dim, 2 * size + 1, output_names[place])
        evidence.append(
            AxisEvidence(dim=dim, kind="declared", text="given in Inputs(dynamic_axes=)")
        )
    first = next((dims[0] for dims in inputs if 0 in dims), None)
    return AxisPlan(inputs=inputs, outputs=tuple(outputs), batch=first, evidence=tuple(evidence))


def _named_axes(name: str, axes: Sequence[int]) -> dict[int, str]:
    return {axis: BATCH if axis == 0 else f"{name}_dim{axis}" for axis in axes}


# --- sizes that differed between observed calls -----------------------------------------------


def _varied(
    run: Run, calls: Sequence[Tensors], names: Sequence[str], output_names: Sequence[str]
) -> AxisPlan:
    """Dims that differed between calls; dims that differed alike share a name."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, tensors in enumerate(zip(*calls, strict=True)):
        for axis, sizes in enumerate(zip(*(tensor.shape for tensor in tensors), strict=True)):
            if len(set(sizes)) > 1:
                groups.setdefault(sizes, []).append((place, axis))
    results = [run(call) for call in calls] if groups else [run(calls[0])]
    inputs: list[dict[int, str]] = [{} for _ in calls[0]]
    outputs: list[dict[int, str]] = [{} for _ in results[0]]
    evidence: list[AxisEvidence] = []
    taken: set[str] = set()
    for sizes, places in groups.items():
        dim = _dim_name(places, calls[0], names, taken)
        taken.add(dim)
        for place, axis in places:
            inputs[place][axis] = dim
        where = ", ".join(f"{names[place]}[{axis}]" for place, axis in places)
        evidence.append(
            AxisEvidence(dim=dim, kind="varied", text=f"{where} had sizes {sorted(set(sizes))}")
        )
    for place, tensors in enumerate(zip(*results, strict=True)):
        for axis, sizes in enumerate(zip(*(tensor.shape for tensor in tensors), strict=True)):
            if len(set(sizes)) > 1:
                where = f"{output_names[place]}_dim{axis}"
                outputs[place][axis] = _output_dim(sizes, groups, inputs) or where
    plan = AxisPlan(inputs=tuple(inputs), outputs=tuple(outputs), evidence=tuple(evidence))
    return replace(plan, batch=BATCH) if BATCH in taken else plan


def _output_dim(
    sizes: tuple[int, ...],
    groups: Mapping[tuple[int, ...], list[tuple[int, int]]],
    inputs: Sequence[Mapping[int, str]],
) -> str | None:
    if sizes not in groups:
        return None
    place, axis = groups[sizes][0]
    return inputs[place][axis]


def _dim_name(
    places: Sequence[tuple[int, int]], call: Tensors, names: Sequence[str], taken: set[str]
) -> str:
    """Name a dimension by where it stands: batch, sequence, height, width."""
    place, axis = places[0]
    tensor = call[place]
    usual: str | None = None
    if all(axis == 0 for _, axis in places):
        usual = BATCH
    elif axis == 1 and tensor.ndim in SEQUENCE_RANKS:
        usual = "sequence"
    elif tensor.ndim == IMAGE_RANK and axis in {2, 3}:
        usual = "height" if axis == 2 else "width"  # noqa: PLR2004
    return usual if usual and usual not in taken else f"{names[place]}_dim{axis}"


# --- the permute-and-repeat test --------------------------------------------------------------


def _probe_batch(run: Run, call: Tensors, plan: AxisPlan, output_names: Sequence[str]) -> AxisPlan:
    """Try candidate batch axes; take the first that passes, else the first that is accepted."""
    weak: AxisPlan | None = None
    for places in _candidates(call, plan.inputs):
        found = _probe(run, call, places, plan, output_names)
        if found is None:
            continue
        if not found.warnings:
            return found
        weak = weak or found
    if weak is not None:
        return weak
    rest = "the other" if plan.evidence else "all"
    text = f"No batch axis was found: {rest} sizes are static."
    return replace(plan, warnings=(*plan.warnings, text))


def _candidates(call: Tensors, known: Axes) -> Iterator[dict[int, int]]:
    """Yield sets of (input -> axis) that may be the batch axis, likeliest first."""
    tried: list[dict[int, int]] = []
    for places in _all_candidates(call, known):
        if places and places not in tried:
            tried.append(places)
            yield places


def _all_candidates(call: Tensors, known: Axes) -> Iterator[dict[int, int]]:
    free = [
        {axis: size for axis, size in enumerate(tensor.shape) if axis not in dims}
        for tensor, dims in zip(call, known, strict=True)
    ]
    for axis in (0, 1):
        sizes = [axes[axis] for axes in free if axes.get(axis, 0) > 0]
        for size in sorted(set(sizes), key=lambda size: (-sizes.count(size), sizes.index(size))):
            yield {place: axis for place, axes in enumerate(free) if axes.get(axis) == size}
            if axis == 0:
                firsts = {
                    place: next((a for a, s in axes.items() if s == size), None)
                    for place, axes in enumerate(free)
                }
                yield {place: a for place, a in firsts.items() if a is not None}
                yield from _subsets([p for p, axes in enumerate(free) if axes.get(0) == size])


def _subsets(places: Sequence[int]) -> Iterator[dict[int, int]]:
    """Yield what is left when one input or all but one have the batch's size by accident."""
    for left_out in reversed(places):
        yield {place: 0 for place in places if place != left_out}
    for place in places:
        yield {place: 0}


def _probe(
    run: Run,
    call: Tensors,
    places: Mapping[int, int],
    plan: AxisPlan,
    output_names: Sequence[str],
) -> AxisPlan | None:
    size = call[next(iter(places))].shape[next(iter(places.values()))]
    kept = min(size, BASE_ROWS)
    index = _shuffled_rows(kept)
    few = _at(call, places, torch.arange(kept))
    try:
        before, after = run(few), run(_at(few, places, index))
    except Exception:  # noqa: BLE001 - a module may refuse another size with any error
        return None
    if not len(before) == len(after) == len(output_names):
        return None
    moved = [
        _follows(old, new, BATCH, len(index), name)
        for old, new, name in zip(before, after, output_names, strict=True)
    ]
    accepted = all(
        moved_axes or old.shape == new.shape
        for moved_axes, old, new in zip(moved, before, after, strict=True)
    )
    if not accepted or not any(moved):
        return None
    independent = all(
        _rows_agree(old, new, dims, index)
        for dims, old, new in zip(moved, before, after, strict=True)
    )
    strict_axes = set(places.values()) == {0}
    if not independent and not strict_axes:
        return None
    return _with_batch(plan, places, moved, independent=independent, rows=(kept, len(index)))


def _with_batch(
    plan: AxisPlan,
    places: Mapping[int, int],
    moved: Sequence[dict[int, str]],
    *,
    independent: bool,
    rows: tuple[int, int],
) -> AxisPlan:
    inputs = tuple(
        dims | ({places[place]: BATCH} if place in places else {})
        for place, dims in enumerate(plan.inputs)
    )
    outputs = tuple(dims | new for dims, new in zip(plan.outputs, moved, strict=True))
    text = f"{rows[0]} real rows, shuffled and repeated to {rows[1]}: " + (
        "each row kept its result" if independent else "accepted, but rows depend on each other"
    )
    warning = "Rows of a batch depend on each other: the result of a row changes with its batch."
    return replace(
        plan,
        inputs=inputs,
        outputs=outputs,
        batch=BATCH,
        evidence=(*plan.evidence, AxisEvidence(dim=BATCH, kind="probed", text=text)),
        warnings=plan.warnings if independent else (*plan.warnings, warning),
    )


def _shuffled_rows(count: int) -> torch.Tensor:
    """Return each row once in another order, then ``count + 1`` more: shape ``(2 count + 1,)``."""
    # A generator of our own: the user's random numbers stay untouched.
    generator = torch.Generator().manual_seed(count)
    order = torch.randperm(count, generator=generator)
    if count > 1 and bool((order == torch.arange(count)).all()):
        order = order.flip(0)
    return torch.cat([order, torch.randint(count, (count + 1,), generator=generator)])


def _at(call: Tensors, places: Mapping[int, int], index: torch.Tensor) -> Tensors:
    return tuple(
        take(tensor, [places[place]], index) if place in places else tensor
        for place, tensor in enumerate(call)
    )


def _follows(
    before: torch.Tensor, after: torch.Tensor, dim: str, size: int, name: str
) -> dict[int, str]:
    """Return the axes of an output that changed: ``dim`` where it took the new size itself."""
    if before.ndim != after.ndim:
        return {}
    return {
        axis: dim if new == size else f"{name}_dim{axis}"
        for axis, (old, new) in enumerate(zip(before.shape, after.shape, strict=True))
        if old != new
    }


def _rows_agree(
    before: torch.Tensor, after: torch.Tensor, dims: Mapping[int, str], index: torch.Tensor
) -> bool:
    """Tell whether an output is the old one under the same index, up to rounding."""
    if not dims:
        expected = before
    elif list(dims.values()) == [BATCH]:
        expected = before.index_select(next(iter(dims)), index)
    else:
        return len(dims) == 1  # rows flattened with another axis: the sizes follow, values unseen
    if not expected.is_floating_point():
        return torch.equal(expected, after)
    scale = expected.abs().nan_to_num(posinf=0.0).max().item() if expected.numel() else 0.0
    close = 1e3 * torch.finfo(expected.dtype).eps
    return torch.allclose(after, expected, rtol=close, atol=close * scale, equal_nan=True)
