"""A new checkpoint in a graph that is already there: fill in, prove, and nothing else."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from onnxport.errors import VerificationError
from onnxport.exporter.model_file import twin_of
from onnxport.exporter.template import StaleTemplateError
from onnxport.exporter.weights import weights_sha256
from onnxport.exporter.writer import sync_model, write_filled
from onnxport.inputs.resize import current_sizes, resize, take
from onnxport.pipeline.blueprint import plain_state
from onnxport.pipeline.changes import what_counts
from onnxport.pipeline.job import ModuleMissingError
from onnxport.pipeline.placement import is_unused
from onnxport.pipeline.plan import target_of
from onnxport.pipeline.proof import NO_NUMBER, REAL, Case, Proof, check_case, has_no_number
from onnxport.pipeline.runs import run_flat
from onnxport.pipeline.verdict import Verdict, on_each_provider, refused_before
from onnxport.tree import flatten, same_structure
from onnxport.validation.budget import pinned_reference
from onnxport.validation.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from onnxport.exporter.frontier import Evaluate
    from onnxport.pipeline.blueprint import Blueprint
    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.open_template import Filled
    from onnxport.pipeline.plan import Plan
    from onnxport.report import Check

__all__ = ["Refreshed", "refresh"]

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refreshed:
    """What came of a refresh.

    Args:
        checks: The proof.
        weights_sha256: Hash of the checkpoint's ``state_dict``.
        warnings: What the user should know besides what was known at the export.
        cases: What PyTorch gave.
    """

    checks: tuple[Check, ...]
    weights_sha256: str
    warnings: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()


def refresh(
    blueprint: Blueprint,
    job: ExportJob,
    staged: Path,
    evaluate: Evaluate,
    metadata: Callable[[str], Mapping[str, object]],
    timed: Callable[[str], AbstractContextManager[None]],
) -> Refreshed:
    """Write a model with a checkpoint's weights and prove it.

    Args:
        blueprint: What is known from an export of the same module.
        job: The checkpoint.
        staged: Where to write.
        evaluate: Runs prep graphs.
        metadata: Gives what the file says of itself, for the hash of the weights.
        timed: Measures a stage.

    Raises:
        StaleTemplateError: If the module has changed its shape since the export.
        VerificationError: If the model is not what the module computes now.
        PublishError: If the disk does not take it.
    """
    with ThreadPoolExecutor(1) as pool:
        with timed("refresh"):
            state = job.source.state()
            blueprint.require_fit(job, state)
            changed = blueprint.changed(job)
            if changed:
                try:
                    _require_unread(blueprint, job, changed)
                    blueprint.accept(job)
                    changed = frozenset()
                except ModuleMissingError:  # only what it computed can be compared
                    logger.debug("The module is not here to be asked.")
            digest = pool.submit(weights_sha256, state)
            write_filled(
                blueprint.template,
                staged,
                blueprint.template.fill(plain_state(state), evaluate),
                lambda: metadata(digest.result()),
                sync=False,
            )
            del state  # mapped memory counts as long as it is mapped
        synced = pool.submit(sync_model, staged)  # the disk works while the model is proven
        with timed("prove"):
            proven, cases = _prove(blueprint, job, staged)
            warnings = proven.warnings
            if changed:
                text = (
                    f"{', '.join(sorted(changed))} changed since the graph was made, and is no "
                    "weight. The module is not here to be exported anew; what it computed in "
                    "training was compared."
                )
                warnings = (*warnings, text)
        with timed("sync"):
            synced.result()
    return Refreshed(
        checks=proven.checks, weights_sha256=digest.result(), warnings=warnings, cases=cases
    )


def _doubts(job: ExportJob) -> tuple[str, ...]:
    """Return what a comparison with the live module does not say."""
    numberless = job.reference is not None and has_no_number(job.reference.outputs)
    return (NO_NUMBER,) if numberless else ()


def _prove(blueprint: Blueprint, job: ExportJob, staged: Path) -> tuple[Verdict, tuple[Case, ...]]:
    """Compare with what the live module gave; if that says too little or no, with the module.

    Raises:
        ModuleMissingError: If the module is needed and is not here.
        VerificationError: If the model is wrong.
    """
    live, wrong = tuple(_live_cases(blueprint, job)), ""
    if live:
        try:
            doubts = Verdict(warnings=_doubts(job))
            return _judge(blueprint, job, staged, live).and_(doubts), live
        except VerificationError as error:
            logger.debug("The quick proof failed: the module is asked.", exc_info=True)
            wrong = str(error)
    warnings: list[str] = []
    try:
        plan = blueprint.plan_for(*target_of(job, warnings))
    except ModuleMissingError as error:
        error.add_note(wrong)
        raise
    if not live:
        try:
            own = (_own_case(blueprint, plan, job),)
            verdict = _judge(blueprint, job, staged, own)
            return verdict.and_(Verdict(warnings=(*warnings,))), own
        except VerificationError:
            logger.debug("The quick proof failed: more is tried.", exc_info=True)
    proof = Proof(plan, job.options.verify)
    said = Verdict(warnings=(*warnings, *proof.warnings))
    return _judge(blueprint, job, staged, proof.cases).and_(said), proof.cases


def _require_unread(blueprint: Blueprint, job: ExportJob, changed: frozenset[str]) -> None:
    """Refuse a graph that may hold what has changed.

    Raises:
        ModuleMissingError: If the module is not here.
        StaleTemplateError: With the names of what has changed.
    """
    read = changed
    plan = blueprint.plan_for(*target_of(job, []))
    if "script" not in blueprint.rung.key:  # a script has branches that no run took
        read = what_counts(changed, plan, job.options.opset)
    if read:
        raise StaleTemplateError(f"{', '.join(sorted(read))} changed, and is no weight.")


def _judge(blueprint: Blueprint, job: ExportJob, staged: Path, cases: Sequence[Case]) -> Verdict:
    """Run the file in ONNX Runtime, its weights where they lie.

    A graph that is loaded already does; what it refuses is decided by loading the file. Where its
    nodes run is known from the export: weights do not change it.
    """
    verify = job.options.verify

    def prove(provider: str, before: tuple[Check, ...]) -> Verdict:
        try:
            filled = blueprint.opened.with_file(staged, provider)
            made = None if filled is None else _run_all(blueprint, filled, cases, before)
        except VerificationError:
            logger.debug("The file itself is asked.", exc_info=True)
            made = None
        if made is None:
            made = _run_file(blueprint, staged, provider, cases, before, verify.gpu_memory_mb)
        return Verdict(checks=made[len(before) :])

    return on_each_provider(verify, prove, _not_for(blueprint))


def _not_for(blueprint: Blueprint) -> frozenset[str]:
    """Return the providers that refuse the graph, or leave all of its nodes to others."""
    known = blueprint.report
    unused = {placement.provider for placement in known.placements if is_unused(placement)}
    return refused_before(known.warnings) | unused


def _run_file(
    blueprint: Blueprint,
    staged: Path,
    provider: str,
    cases: Sequence[Case],
    before: tuple[Check, ...],
    memory: int | None,
) -> tuple[Check, ...]:
    with (
        twin_of(staged) as twin,
        closing(Session(twin, provider, in_place=True, spare=1, gpu_memory_mb=memory)) as session,
    ):
        return _run_all(blueprint, session, cases, before)


def _run_all(
    blueprint: Blueprint,
    session: Session | Filled,
    cases: Sequence[Case],
    checks: tuple[Check, ...],
) -> tuple[Check, ...]:
    for case in cases:
        checks = (*checks, check_case(blueprint.plan.signature, session, case, checks))
    return checks


def _live_cases(blueprint: Blueprint, job: ExportJob) -> Iterator[Case]:
    """Yield what the live module says of this checkpoint: its rows, one of them, and all repeated.

    The last two for models that are not large, whose runs cost more than all the writing.
    Where each row keeps its result in any batch, which the export has shown, the rows of one run
    say what comes out at other batch sizes. Nothing is yielded where the run says nothing of the
    model itself: on another device, in another precision, of another function.
    """
    reference, plan = job.reference, blueprint.plan
    if reference is None or not reference.exact or plan.dtype is not None:
        return
    if not isinstance(job.target, str) or reference.target != job.target:
        return
    spec, found = flatten((reference.example.args, dict(reference.example.kwargs)))
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in reference.outputs]
    if not same_structure(spec, blueprint.spec) or kinds != [
        each.dtype for each in plan.signature.outputs
    ]:
        return
    inputs, outputs = tuple(tensor for _, tensor in found), reference.outputs
    yield _case(blueprint, job, inputs, outputs)
    rows = _rows(blueprint, inputs)
    if rows is None or rows == 1 or blueprint.is_large:
        return
    for index in ([rows - 1], [*range(rows), *range(rows), 0]):
        places = torch.tensor(index)
        yield _case(
            blueprint,
            job,
            _indexed(inputs, plan.axes.inputs, plan.axes.batches, places),
            _indexed(outputs, plan.axes.outputs, plan.axes.batches, places),
        )


def _own_case(blueprint: Blueprint, plan: Plan, job: ExportJob) -> Case:
    """Run the copy on a few rows, where the live module says too little.

    It ran on another device or in another precision, or what is exported is a wrapper around it.
    """
    fewer = dict.fromkeys(plan.axes.batches, blueprint.rows)
    inputs = resize(plan.calls[0], plan.axes.inputs, fewer)
    return _case(blueprint, job, inputs, run_flat(plan.flat, inputs, isolate=True))


def _rows(blueprint: Blueprint, inputs: Tensors) -> int | None:
    """Return how many rows a call has, if every output follows them one by one."""
    axes = blueprint.plan.axes
    sizes = current_sizes(inputs, axes.inputs)
    counts = {sizes[name] for name in axes.batches}
    derived = {name for dims in axes.outputs for name in dims.values()} - set(axes.names)
    return counts.pop() if axes.independent and len(counts) == 1 and not derived else None


def _indexed(
    tensors: Tensors,
    axes: Sequence[Mapping[int, str]],
    batches: Sequence[str],
    places: torch.Tensor,
) -> Tensors:
    return tuple(
        take(tensor, [axis for axis, name in dims.items() if name in batches], places)
        for tensor, dims in zip(tensors, axes, strict=True)
    )


def _case(blueprint: Blueprint, job: ExportJob, inputs: Tensors, outputs: Tensors) -> Case:
    return Case(
        sizes=current_sizes(inputs, blueprint.plan.axes.inputs),
        rows=REAL,
        inputs=inputs,
        references=tuple(
            pinned_reference(tensor, noise, job.options.verify.tolerance)
            for tensor, noise in zip(outputs, blueprint.noise, strict=True)
        ),
    )
