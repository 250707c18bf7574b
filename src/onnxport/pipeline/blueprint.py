"""What is kept of a proven export so that the next checkpoint needs no export of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from onnxport._torch_compat import plain_name
from onnxport.exporter.fingerprint import changed_paths
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.template import StaleTemplateError
from onnxport.inputs.resize import current_sizes, resize
from onnxport.tree import Example, flatten, rebuild, same_structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    import torch
    from torch import nn

    from onnxport.exporter.ladder import Rung
    from onnxport.exporter.template import Template
    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.open_template import OpenTemplate
    from onnxport.pipeline.plan import Plan
    from onnxport.report import ExportReport
    from onnxport.tree import Spec

__all__ = ["Blueprint", "plain_state"]

REFERENCE_ROWS = 2
"""Rows of the call that the live module runs at each checkpoint: that the graph takes any number of
them was shown by the export, and weights do not change it."""

LARGE_BYTES = 32 * 2**20
"""Of larger models one row is run, in training and in the proof: it passes all weights."""

INDIFFERENT = 3
"""An attribute that changed this often, and no run looked at it or each new export gave the same
graph, is watched no more until there is another graph: a counter. That it makes a difference later
shows in what the live module computes."""


@dataclass(kw_only=True)
class Blueprint:
    """A proven model without its weights, and what it takes to prove it with others.

    Args:
        opened: The graph, and how to fill it.
        plan: The plan without the module, which holds weights.
        spec: Structure of a call.
        keeps_state: Whether a run changes the module.
        rung: How it was exported.
        report: The report of that.
        noise: Relative error of PyTorch in each output, as it was measured then.
        schema: Shape of each entry of the ``state_dict``.
        fingerprint: What of the live module was no weight.
        example: A call of few rows, for the live module; ``None`` where the target gets more than
            the model does.
        metadata: What the file says of itself, but for the checkpoint.
        changes: How often an attribute has changed and made no difference, see ``INDIFFERENT``.
    """

    opened: OpenTemplate
    plan: Plan
    spec: Spec
    keeps_state: bool
    rung: Rung
    report: ExportReport
    noise: Sequence[float]
    schema: Mapping[str, tuple[int, ...]]
    fingerprint: Mapping[str, str] | None
    example: Example | None
    metadata: Mapping[str, object]
    changes: Counter[str] = field(default_factory=Counter)
    _seen: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)

    @property
    def template(self) -> Template:
        """The graph without weights."""
        return self.opened.template

    @property
    def is_large(self) -> bool:
        """Whether a run of it is dear enough to be made once and on one row."""
        return self.template.nbytes > LARGE_BYTES

    @property
    def rows(self) -> int:
        """How many rows the live module is asked for."""
        ones = (
            {size for name, size in check.sizes.items() if name in self.plan.axes.batches}
            for check in self.report.checks
        )
        # Where rows interact, some weights have nothing to say about a single one.
        alone = self.is_large and self.plan.axes.independent and {1} in ones
        return 1 if alone else REFERENCE_ROWS

    @classmethod
    def of(
        cls,
        job: ExportJob,
        plan: Plan,
        opened: OpenTemplate,
        *,
        rung: Rung,
        report: ExportReport,
        noise: Sequence[float],
        metadata: Mapping[str, object],
    ) -> Blueprint:
        """Keep what is needed of an export that was proven."""
        made = cls(
            opened=opened,
            plan=plan.without_module(),
            spec=plan.flat.spec,
            keeps_state=plan.flat.keeps_state,
            rung=rung,
            report=report,
            noise=noise,
            schema=_schema(job.source.state()),
            fingerprint=job.fingerprint,
            example=None,
            metadata=metadata,
            _seen={shape for example in job.examples if (shape := _shape(example, plan.flat.spec))},
        )
        return replace(made, example=_small_example(job, plan, made.rows))

    def plan_for(self, root: nn.Module, module: nn.Module) -> Plan:
        """Return the plan for a module with other weights."""
        if self.plan.dtype is not None:
            module.to(self.plan.dtype)
        flat = FlatModule(module, self.spec)
        flat.keeps_state = self.keeps_state
        return replace(self.plan, root=root, flat=flat)

    def require_fit(self, job: ExportJob, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of a module that has changed its shape, or that takes other calls.

        Raises:
            StaleTemplateError: With what is different.
        """
        schema = _schema(state)
        if schema != self.schema:
            names = [
                name
                for name in schema.keys() | self.schema.keys()
                if schema.get(name) != self.schema.get(name)
            ]
            raise StaleTemplateError(
                f"{len(names)} tensors of the module are new, gone or of another shape, "
                f"e.g. {min(names)!r}."
            )
        for example in job.examples:
            shape = _shape(example, self.spec)
            if shape is not None and shape not in self._seen and not self._takes(shape):
                raise StaleTemplateError("A call of a size was seen that the model does not take.")

    def _takes(self, shape: tuple[tuple[int, ...], ...]) -> bool:
        specs = self.plan.signature.inputs
        return all(
            isinstance(dim, str) or dim == size
            for spec, sizes in zip(specs, shape, strict=True)
            for dim, size in zip(spec.shape, sizes, strict=True)
        )

    def changed(self, job: ExportJob, *, often: int = INDIFFERENT) -> frozenset[str]:
        """Return which attributes are other than they were, but those that make no difference.

        Args:
            job: The checkpoint.
            often: How often an attribute must have changed without a difference.
        """
        if self.fingerprint is None or job.fingerprint is None:
            return frozenset()
        changed = changed_paths(self.fingerprint, job.fingerprint)
        return frozenset(path for path in changed if self.changes[path] < often)

    def accept(self, job: ExportJob) -> None:
        """Note that what changed is nothing that a run of the module looks at."""
        self.changes.update(self.changed(job))
        self.fingerprint = job.fingerprint

    def learn_from(self, before: Blueprint) -> None:
        """Count which attributes changed since an earlier export, and made no other graph.

        Another graph may hold what the one before did not: all is counted anew.
        """
        if self.fingerprint is not None and self.template == before.template:
            self.changes = before.changes
            self.changes.update(changed_paths(before.fingerprint or {}, self.fingerprint))


def plain_state(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a ``state_dict`` under their names without ``torch.compile``."""
    return {plain_name(name): value for name, value in state.items() if hasattr(value, "shape")}


def _schema(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in plain_state(state).items()}


def _shape(example: Example, spec: Spec) -> tuple[tuple[int, ...], ...] | None:
    """Return the sizes of a call, or ``None`` if it is no call of this structure."""
    other, found = flatten((example.args, dict(example.kwargs)))
    if not same_structure(spec, other):
        return None
    return tuple(tuple(tensor.shape) for _, tensor in found)


def _small_example(job: ExportJob, plan: Plan, rows: int) -> Example | None:
    example = job.examples[0]
    spec, found = flatten((example.args, dict(example.kwargs)))
    if not isinstance(job.target, str) or not same_structure(spec, plan.flat.spec):
        return None
    tensors = tuple(tensor for _, tensor in found)
    sizes = current_sizes(tensors, plan.axes.inputs)
    fewer = {name: min(sizes[name], rows) for name in plan.axes.batches}
    args, kwargs = rebuild(spec, resize(tensors, plan.axes.inputs, fewer), fresh=True)
    return Example(tuple(args), dict(kwargs))
