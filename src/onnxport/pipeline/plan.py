"""From a job to everything the cores and the proof need."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport._torch_compat import DEFAULT_OPSET, export_context, fake_tensors
from onnxport.config import PRECISIONS
from onnxport.exporter.base import ExportRequest
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import watched
from onnxport.exporter.module_state import evaluate
from onnxport.exporter.target import FunctionModule, find_target
from onnxport.inputs.axes import AxisPlan, Module, declared_axes, infer_axes
from onnxport.inputs.naming import input_names, output_names
from onnxport.inputs.resize import current_sizes, resize
from onnxport.inputs.rows import many_rows
from onnxport.pipeline.calls import of_one_structure, used_parts
from onnxport.pipeline.eager import compare_with_live, first_run
from onnxport.pipeline.runs import ShapeProbe, run_flat
from onnxport.signature import ModelSignature, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np

    from onnxport.config import ExportOptions
    from onnxport.pipeline.job import ExportJob

__all__ = ["Plan", "make_plan", "target_of"]

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]

_DTYPES = dict(
    zip(PRECISIONS, (torch.float32, torch.float16, torch.bfloat16, torch.float64), strict=True)
)
_EXPORT_SIZES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
"""Sizes of the batch while exporting: never 1, which exporters specialise; and none that another
dim has, which they would tie to it."""


MAX_ROW_BYTES = 2**18
"""Of an input example, which MLflow writes as text, twice, at ten times its size."""
MAX_TABLE = 2048
"""Longer tables are not outgrown: an export at such a size would be dear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A module in flat form, its calls, its signature and its axes.

    Args:
        root: The whole module, whose ``state_dict`` is the checkpoint's.
        flat: What is exported of it.
        calls: Flat calls of that.
        signature: Inputs and outputs.
        axes: Which axes vary.
        warnings: What is known so far.
        as_seen: Gives the axes as they were seen to vary.
        dtype: What the module was cast to, or ``None``.
    """

    root: nn.Module
    flat: FlatModule
    calls: tuple[Tensors, ...]
    signature: ModelSignature
    axes: AxisPlan
    warnings: tuple[str, ...]
    as_seen: Callable[[], AxisPlan] | None = None
    dtype: torch.dtype | None = None

    @property
    def rows(self) -> Tensors:
        """The first call with as many different rows as there are."""
        return many_rows(self.calls, self.axes)

    def without_module(self) -> Plan:
        """Return the plan with empty modules: what is kept of it must not hold weights."""
        empty = nn.Module()
        return replace(self, root=empty, flat=FlatModule(empty, self.flat.spec), as_seen=None)

    def fallbacks(self) -> Iterator[Plan]:
        """Yield plans that ask less of an exporter.

        First, sizes vary only as they were seen to: together, and by the steps between them; then
        the batch alone is dynamic. Axes that the user declared are never given up, nor is a batch:
        a model for one batch size is not what anybody expects.
        """
        if self.as_seen is None:
            return
        others = [name for name in self.axes.names if name not in self.axes.batches]
        seen = self.as_seen() if others else self.axes
        if (seen.inputs, seen.steps) != (self.axes.inputs, self.axes.steps):
            text = (
                "No core could keep all sizes free that PyTorch accepts: sizes are proven only as "
                "they were seen to vary, see the evidence. Why is said under attempts."
            )
            yield self._with_axes(replace(seen, warnings=(*seen.warnings, text)))
        if self.axes.batch is not None and others:
            text = (
                f"No core could keep {', '.join(others)} dynamic: the model takes the observed "
                "sizes of these only. Why is said under attempts."
            )
            yield self._with_axes(self.axes.only(self.axes.batches, text))

    def _with_axes(self, axes: AxisPlan) -> Plan:
        signature = ModelSignature(
            inputs=_with_dims(self.signature.inputs, self.calls[0], axes.inputs),
            outputs=_with_dims(self.signature.outputs, self._outputs(), axes.outputs),
        )
        return replace(
            self,
            calls=tuple(call for call in self.calls if _same_sizes(call, self.calls[0], axes)),
            signature=signature,
            axes=replace(axes, warnings=()),
            warnings=(*self.warnings, *axes.warnings),
        )

    def _outputs(self) -> Tensors:
        return run_flat(self.flat, self.calls[0])

    def request(self, opset: int | None) -> ExportRequest:
        """Return what the cores are asked for."""
        return ExportRequest(
            module=self.flat,
            args=resize(self.rows, self.axes.inputs, self._export_sizes()),
            input_names=tuple(spec.name for spec in self.signature.inputs),
            output_names=tuple(spec.name for spec in self.signature.outputs),
            input_axes=self.axes.inputs,
            output_axes=self.axes.outputs,
            opset=DEFAULT_OPSET if opset is None else opset,
        )

    def _export_sizes(self) -> dict[str, int]:
        sizes = current_sizes(self.calls[0], self.axes.inputs)
        batches = self.axes.batches
        specs = (*self.signature.inputs, *self.signature.outputs)
        used = {size for spec in specs for size in spec.shape if isinstance(size, int)}
        used |= {size for name, size in sizes.items() if name not in batches}
        free = [size for size in _EXPORT_SIZES if size not in used]
        free += range(max(used, default=1) + 1, max(used, default=1) + 1 + len(batches))
        chosen = sizes | dict(zip(batches, free, strict=False))
        return chosen | self._growing_sizes(chosen)

    def _growing_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return larger sizes at which the module changes itself, where it does so only there.

        A table that is long enough for every call seen is not made anew at their sizes, and an
        export there would keep its length. Where it is made anew, that is what is recorded.
        """
        steps = self.axes.steps or {}
        seen = [current_sizes(call, self.axes.inputs) for call in self.calls]
        largest = {
            name: max(call[name] for call in seen)
            for name in sizes
            if name not in self.axes.batches
        }
        if not largest or self.flat.keeps_state:
            return {}
        for least in (1, *_longest_table(self.flat)):
            larger = {
                name: size + steps.get(name, 1) * max(size, least) for name, size in largest.items()
            }
            if self._grows({**sizes, **larger}):
                self.flat.keeps_state = True
                return larger
        return {}

    def _grows(self, sizes: Mapping[str, int]) -> bool:
        """Tell, by a run that computes nothing, whether the module changes itself at some sizes."""
        try:
            with preserved_globals(), export_context(), fake_tensors(self.calls[0]) as fakes:
                larger = [
                    fake.new_zeros(
                        [sizes.get(dims.get(a, ""), n) for a, n in enumerate(fake.shape)]
                    )
                    for fake, dims in zip(fakes, self.axes.inputs, strict=True)
                ]
                _, changed = watched(self.flat, lambda: self.flat(*larger))
                return changed
        except Exception:
            logger.debug("the module refuses larger sizes", exc_info=True)
            return False


def _longest_table(module: nn.Module) -> list[int]:
    """Return the longest axis of what a module keeps besides its state, if it is not huge.

    A table may have grown for a call that was not recorded.
    """
    sizes = [
        size
        for submodule in module.modules()
        for value in (*vars(submodule).values(), *_passing_buffers(submodule))
        if isinstance(value, torch.Tensor)
        for size in value.shape
    ]
    longest = max(sizes, default=0)
    return [longest] if 1 < longest <= MAX_TABLE else []


def _passing_buffers(module: nn.Module) -> list[torch.Tensor | None]:
    """Return the buffers that no checkpoint holds: what can be made anew."""
    passing = module._non_persistent_buffers_set  # noqa: SLF001 - has no public name
    return [buffer for name, buffer in module._buffers.items() if name in passing]  # noqa: SLF001


def target_of(job: ExportJob, warnings: list[str]) -> tuple[nn.Module, nn.Module]:
    """Return a job's module and the part of it that is exported, in eval mode.

    Raises:
        ExportError: If the module is not what the live module is.
    """
    root, known = job.source.module()
    warnings += known
    evaluate(root)
    if job.reference is not None:
        compare_with_live(find_target(root, job.reference.target), job.reference)
    return root, evaluate(find_target(root, job.target))


def make_plan(job: ExportJob) -> Plan:
    """Work out names, axes and signature of a job's module.

    Raises:
        InputInferenceError: If there is no example with a tensor.
        ExportError: If the module does not run, is random in eval mode, or is not what the live
            module is.
    """
    warnings: list[str] = []
    root, module = target_of(job, warnings)
    examples = used_parts(module, job.examples, warnings)
    dtype = _precision(module, job.options, warnings)
    if dtype is not None:
        module.to(dtype)
    spec, paths, calls = of_one_structure(examples, warnings)
    if dtype is not None:
        calls = tuple(tuple(_cast(tensor, dtype) for tensor in call) for call in calls)
    flat = FlatModule(module, spec)
    outputs = first_run(flat, calls[0])
    given = job.options.inputs
    called = module.function if isinstance(module, FunctionModule) else module.forward
    names = input_names(called, paths, given.names)
    out_names = output_names([path for path, _ in outputs], names, given.output_names)

    probed = Module(
        run=lambda tensors: run_flat(flat, tensors),
        shapes=ShapeProbe(flat),
        names=names,
        output_names=out_names,
    )
    if given.dynamic_axes is None:
        axes = infer_axes(probed, calls)
    else:
        axes = declared_axes(probed, calls[0], given.dynamic_axes)
        calls = _of_declared_sizes(calls, axes, names, warnings)
    signature = ModelSignature(
        inputs=_specs(names, calls[0], axes.inputs),
        outputs=_specs(out_names, [tensor for _, tensor in outputs], axes.outputs),
    )
    return Plan(
        root=root,
        flat=flat,
        dtype=dtype,
        calls=calls,
        signature=signature,
        axes=replace(axes, warnings=()),
        warnings=(*warnings, *axes.warnings),
        as_seen=None if given.dynamic_axes else lambda: infer_axes(probed, calls, as_seen=True),
    )


def _precision(
    module: nn.Module, options: ExportOptions, warnings: list[str]
) -> torch.dtype | None:
    """Return the dtype to cast to, or ``None`` to leave the module as it is."""
    if options.precision is not None:
        return _DTYPES[options.precision]
    if any(tensor.dtype is torch.bfloat16 for tensor in module.state_dict().values()):
        # ONNX Runtime's CPU provider has almost no bfloat16 kernels.
        warnings.append("The weights are bfloat16 and were exported as float32, exactly.")
        return torch.float32
    return None


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _of_declared_sizes(
    calls: Sequence[Tensors], axes: AxisPlan, names: Sequence[str], warnings: list[str]
) -> tuple[Tensors, ...]:
    """Leave out calls that a model cannot get whose axes were declared."""
    kept = tuple(call for call in calls if _same_sizes(call, calls[0], axes))
    if len(kept) < len(calls):
        static = sorted(
            f"axis {axis} of {name!r}"
            for place, (name, dims) in enumerate(zip(names, axes.inputs, strict=True))
            for axis in range(calls[0][place].ndim)
            if axis not in dims and len({call[place].shape[axis] for call in calls}) > 1
        )
        warnings.append(
            f"{len(calls) - len(kept)} of {len(calls)} calls have another size than the first one "
            f"in {', '.join(static)}, which Inputs(dynamic_axes=) leaves static: the model does "
            "not take them."
        )
    return kept


def _same_sizes(call: Tensors, first: Tensors, axes: AxisPlan) -> bool:
    """Tell whether a call has the sizes of the first one wherever these are static."""
    return all(
        size == expected or axis in dims
        for tensor, other, dims in zip(call, first, axes.inputs, strict=True)
        for axis, (size, expected) in enumerate(zip(tensor.shape, other.shape, strict=True))
    )


def _with_dims(
    specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], axes: Sequence[Mapping[int, str]]
) -> tuple[TensorSpec, ...]:
    return _specs([spec.name for spec in specs], tensors, axes)


def _specs(
    names: Sequence[str], tensors: Sequence[torch.Tensor], axes: Sequence[Mapping[int, str]]
) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(dims.get(axis, size) for axis, size in enumerate(tensor.shape)),
        )
        for name, tensor, dims in zip(names, tensors, axes, strict=True)
    )


def one_row(plan: Plan) -> dict[str, np.ndarray[Any, Any]] | None:
    """Return one row of the first call, by the names of the inputs.

    Returns:
        ``None`` if it has more than 256 KB, or a type that NumPy does not know.
    """
    axes = plan.axes
    tensors = resize(plan.calls[0], axes.inputs, dict.fromkeys(axes.batches, 1))
    if sum(tensor.nbytes for tensor in tensors) > MAX_ROW_BYTES:
        return None
    try:
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
    except TypeError:  # bfloat16
        return None
    names = [spec.name for spec in plan.signature.inputs]
    return dict(zip(names, arrays, strict=True))
