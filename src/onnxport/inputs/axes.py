"""Find the axes that may vary, with the evidence for each.

Strongest first: sizes that differed between observed calls; then the permute-and-repeat test, which
finds the batch when all calls had one batch size; where neither shows anything, that other sizes
are accepted. Which output axes follow is read off runs in which one dimension at a time has another
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onnxport.errors import ConfigurationError, InputInferenceError
from onnxport.inputs.batch import BASE_ROWS, BatchFinding, find_batch, probe
from onnxport.inputs.dims import (
    BATCH,
    AxisPlan,
    Dim,
    dim_name,
    follows,
    grown,
    size_of,
)
from onnxport.inputs.resize import negate
from onnxport.inputs.varied import accepted_dims, stepped, untied, varied_dims
from onnxport.report import AxisEvidence

if TYPE_CHECKING:
    from onnxport.inputs.dims import Place, Run, Shapes, Tensors

__all__ = ["AxisPlan", "Module", "declared_axes", "infer_axes"]

DEPENDENT = "Rows of a batch depend on each other: the result of a row changes with its batch."


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """What inference needs to know of a module.

    Args:
        run: Runs it in eval mode: flat tensors in, flat tensors out.
        shapes: Gives the shapes of its outputs for some inputs, or ``None`` where it refuses them;
            default: by running it.
        names: Names of its inputs.
        output_names: Names of its outputs.
    """

    run: Run
    names: Sequence[str]
    output_names: Sequence[str]
    shapes: Shapes | None = None

    @property
    def shapes_of(self) -> Shapes:
        """``shapes``, or the module run for its shapes."""
        return self.shapes if self.shapes is not None else self._run_for_shapes

    def _run_for_shapes(self, tensors: Tensors) -> tuple[tuple[int, ...], ...] | None:
        try:
            return tuple(tuple(tensor.shape) for tensor in self.run(tensors))
        except Exception:  # noqa: BLE001 - a module may refuse another size with any error
            return None


def infer_axes(module: Module, calls: Sequence[Tensors], *, as_seen: bool = False) -> AxisPlan:
    """Find the dynamic axes of a module from calls that it got.

    Args:
        module: What to run, and the names of its inputs and outputs.
        calls: Observed calls of one structure; the first one is probed.
        as_seen: Take sizes to vary only together and by the steps that the calls showed, also where
            the module accepts more.

    Returns:
        The plan; without any dynamic axis when none was found.

    Raises:
        InputInferenceError: If there is no call.
    """
    if not calls:
        raise InputInferenceError("No call of the model was observed, so nothing can be inferred.")
    varied = varied_dims(calls, module.names)
    batch = find_batch(module.run, calls[0], varied, module.output_names)
    plan = _Draft(module, calls[0])
    if batch is None:
        if not varied and not as_seen:
            varied = accepted_dims(plan.shapes, calls[0], module.names)
        rest = "all sizes but those under evidence" if varied else "all sizes"
        plan.warnings.append(f"No batch axis was found: {rest} are static.")
    else:
        seen = next((d for d in varied if set(batch.places) & set(d.places)), None)
        plan.add_batch(batch, seen)
        _add_second_batch(plan, batch, varied)
    for dim in _rest(varied, plan.places):
        if as_seen:
            plan.add(replace(dim, text=f"{dim.text}; taken in steps of {dim.step}"))
            continue
        for part in untied(plan.shapes, plan.small, dim, module.names):
            plan.add(stepped(plan.shapes, plan.small, part))
    plan.add_data_dependent_sizes(calls)
    return plan.done()


def _add_second_batch(plan: _Draft, batch: BatchFinding, varied: Sequence[Dim]) -> None:
    """Inputs with a batch of their own that had the same size by accident: texts and images."""
    call, (place, axis) = plan.call, batch.places[0]
    size = call[place].shape[axis]
    others = tuple(
        (place, 0)
        for place, tensor in enumerate(call)
        if tensor.ndim and tensor.shape[0] == size and place not in {p for p, _ in batch.places}
    )
    if not others or {p for d in varied for p in d.places} & set(others):
        return
    found = probe(plan.module.run, plan.small, others, plan.module.output_names)
    if found is not None and found.independent:
        plan.add_batch(found, None)


def _rest(varied: Sequence[Dim], taken: set[Place]) -> list[Dim]:
    left = [
        replace(dim, places=tuple(place for place in dim.places if place not in taken))
        for dim in varied
    ]
    return [dim for dim in left if dim.places]


class _Draft:
    """A plan in the making, on a call with few rows."""

    def __init__(self, module: Module, call: Tensors) -> None:
        self.module = module
        self.call = call
        self.small = call
        self.warnings: list[str] = []
        self._inputs: list[dict[int, str]] = [{} for _ in call]
        self._outputs: list[dict[int, str]] = [{} for _ in module.output_names]
        self._evidence: list[AxisEvidence] = []
        self._steps: dict[str, int] = {}
        self._batches: list[str] = []
        self._independent = True

    @property
    def shapes(self) -> Shapes:
        """Gives the shapes of the outputs for some inputs."""
        return self.module.shapes_of

    @property
    def places(self) -> set[Place]:
        """Axes that have a name already."""
        return {(place, axis) for place, dims in enumerate(self._inputs) for axis in dims}

    def add_batch(self, found: BatchFinding, varied: Dim | None) -> None:
        """Add a batch; from here on, runs have few rows."""
        dim = BATCH if not self._batches else f"{self.module.names[found.places[0][0]]}_{BATCH}"
        self._batches.append(dim)
        self._name(dim, found.places)
        for place, axes in enumerate(found.outputs):
            self._follow(place, {a: dim if d == BATCH else d for a, d in axes.items()})
        text = f"{found.rows[0]} real rows, shuffled and repeated to {found.rows[1]}: " + (
            "each row kept its result"
            if found.independent
            else "accepted, but rows depend on each other"
        )
        if varied is not None:
            text = f"{varied.text}; {text}"
        self._evidence.append(
            AxisEvidence(dim=dim, kind="probed" if varied is None else "varied", text=text)
        )
        if not found.independent:
            self._independent = False
            self.warnings.append(DEPENDENT)
        self.small = grown(self.small, found.places, _few(self.small, found.places))

    def add(self, dim: Dim) -> None:
        """Add another dimension, and find which output axes follow it."""
        taken = set(self._taken())
        name = dim_name(dim.places, self.call, self.module.names, self._inputs, taken)
        self._name(name, dim.places)
        self._steps[name] = dim.step
        self._evidence.append(AxisEvidence(dim=name, kind=dim.kind, text=dim.text))
        base = self.shapes(self.small)
        size = size_of(self.small, dim)
        for new in (size + dim.step, size - dim.step):
            moved = self.shapes(grown(self.small, dim.places, new)) if new > 0 else None
            if base is not None and moved is not None:
                for place, (old, now) in enumerate(zip(base, moved, strict=True)):
                    out = self.module.output_names[place]
                    self._follow(place, follows(old, now, name, (size, new), out))
                break

    def add_data_dependent_sizes(self, calls: Sequence[Tensors]) -> None:
        """Name output axes that differ with the data alone, or in a way that no dim explains."""
        tried = [self.small, negate(self.small), *(self._cut(call) for call in calls[1:])]
        known = [shape for call in tried if (shape := self.shapes(call)) is not None]
        for place, some in enumerate(zip(*known, strict=True)):
            if len({len(shape) for shape in some}) > 1:
                continue
            for axis, sizes in enumerate(zip(*some, strict=True)):
                if len(set(sizes)) > 1 and axis not in self._outputs[place]:
                    self._outputs[place][axis] = f"{self.module.output_names[place]}_dim{axis}"

    def done(self) -> AxisPlan:
        """Return the plan."""
        return AxisPlan(
            inputs=tuple(self._inputs),
            outputs=tuple(self._outputs),
            batch=self._batches[0] if self._batches else None,
            batches=tuple(self._batches),
            independent=bool(self._batches) and self._independent,
            steps=self._steps,
            evidence=tuple(self._evidence),
            warnings=tuple(self.warnings),
        )

    def _cut(self, call: Tensors) -> Tensors:
        """Return a call with as few rows as the runs so far had."""
        for batch in self._batches:
            places = [
                (p, a) for p, dims in enumerate(self._inputs) for a in dims if dims[a] == batch
            ]
            call = grown(call, places, _few(self.small, places))
        return call

    def _name(self, dim: str, places: Sequence[Place]) -> None:
        for place, axis in places:
            self._inputs[place][axis] = dim

    def _follow(self, place: int, axes: Mapping[int, str]) -> None:
        """Name output axes; one that follows two dimensions gets a name of its own."""
        for axis, dim in axes.items():
            both = axis in self._outputs[place]
            own = f"{self.module.output_names[place]}_dim{axis}"
            self._outputs[place][axis] = own if both else dim

    def _taken(self) -> list[str]:
        dims = [*self._inputs, *self._outputs]
        return [name for axes in dims for name in axes.values()]


def _few(call: Tensors, places: Sequence[Place]) -> int:
    place, axis = places[0]
    return min(call[place].shape[axis], BASE_ROWS)


# --- axes given by the user ---------------------------------------------------------------------


def declared_axes(
    module: Module, example: Tensors, declared: Mapping[str, Mapping[int, str] | Sequence[int]]
) -> AxisPlan:
    """Take the user's axes for the inputs; outputs follow by running two sizes.

    Raises:
        ConfigurationError: If a name is no input or output, or an input has no such axis.
    """
    names, output_names = module.names, module.output_names
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
    base = module.run(example)
    outputs: list[dict[int, str]] = [{} for _ in base]
    evidence = []
    for dim in dict.fromkeys(dim for dims in inputs for dim in dims.values()):
        places = [(p, a) for p, dims in enumerate(inputs) for a in dims if dims[a] == dim]
        sizes = {example[place].shape[axis] for place, axis in places}
        if len(sizes) > 1:
            raise ConfigurationError(
                f"dynamic_axes gives {dim!r} to axes of sizes {sorted(sizes)!r} in the example. "
                "Give axes that may differ different names."
            )
        (size,) = sizes
        after = _run_declared(module, grown(example, places, 2 * size + 1), dim, 2 * size + 1)
        for place, (old, new) in enumerate(zip(base, after, strict=True)):
            sizes_of = (size, 2 * size + 1)
            outputs[place] |= follows(old.shape, new.shape, dim, sizes_of, output_names[place])
        evidence.append(
            AxisEvidence(dim=dim, kind="declared", text="given in Inputs(dynamic_axes=)")
        )
    first = next((dims[0] for dims in inputs if 0 in dims), None)
    return AxisPlan(
        inputs=inputs,
        outputs=tuple(outputs),
        batch=first,
        batches=() if first is None else (first,),
        evidence=tuple(evidence),
    )


def _run_declared(module: Module, call: Tensors, dim: str, size: int) -> Tensors:
    try:
        return module.run(call)
    except Exception as error:
        raise ConfigurationError(
            f"dynamic_axes declares {dim!r}, but the module does not run with size {size} there: "
            f"{type(error).__name__}: {error}"
        ) from error


def _named_axes(name: str, axes: Sequence[int]) -> dict[int, str]:
    return {axis: BATCH if axis == 0 else f"{name}_dim{axis}" for axis in axes}
