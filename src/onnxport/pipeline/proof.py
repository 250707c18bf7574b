"""The proof: which rows at which sizes, what PyTorch gives, and whether ONNX Runtime agrees."""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from onnxport.errors import ExportError, VerificationError
from onnxport.exporter.model_file import twin_of
from onnxport.inputs.resize import current_sizes, lower, negate, resize, scale, shuffle
from onnxport.pipeline.float64 import Float64
from onnxport.pipeline.placement import elsewhere_text, is_unused, placement_of, require_used
from onnxport.pipeline.runs import run_flat
from onnxport.pipeline.verdict import Verdict, on_each_provider
from onnxport.report import Check
from onnxport.validation.budget import Reference, make_references, pinned_reference, pooled_noise
from onnxport.validation.graph import check_graph, nodes_of_sizes
from onnxport.validation.parity import compare
from onnxport.validation.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from onnxport.config import Tolerance, Verify
    from onnxport.exporter.flat import FlatModule
    from onnxport.pipeline.open_template import Filled
    from onnxport.pipeline.plan import Plan
    from onnxport.signature import ModelSignature

__all__ = ["NO_NUMBER", "REAL", "Case", "Proof", "check_case", "has_no_number"]

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]
REAL, PROBE = "real", "probe"
VARIANTS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "negated": negate,
    "scaled": scale,
    "shuffled": shuffle,
    "lowered": lower,
}
"""Rows made from real ones that may take other branches of the module."""
SMALL_BATCH = 2
LARGE_FILE = 32 * 2**20
FEW = 16
"""Elements of outputs."""
FLOAT64_S = 0.15
"""Seconds in float64, the copy of the module included, after which no more runs are made: some
take seven times as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run to compare.

    Args:
        sizes: Size of each symbolic dimension.
        rows: ``"real"``, or one of :data:`VARIANTS`, so that a branch on the data that was baked in
            by tracing shows.
        inputs: What is fed.
        references: What each output should be.
        refine: Gives references that were dearer to make, for a model that these refuse.
    """

    sizes: Mapping[str, int]
    rows: str
    inputs: Tensors
    references: tuple[Reference, ...]
    refine: Callable[[], tuple[Reference, ...]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What PyTorch gave; the inputs are kept so that no others get their identity."""

    inputs: Tensors
    outputs: Tensors | None
    seconds: float


NO_NUMBER = (
    "All that PyTorch computes with these weights is NaN or infinite. The model does the same, and "
    "nothing more could be compared."
)


class Proof:
    """Runs PyTorch once per case, then judges any number of models.

    Args:
        plan: The module and its axes.
        verify: Sizes, tolerance and providers.

    Attributes:
        cases: The runs to compare.
        warnings: Sizes that PyTorch itself refuses; that it computes no number.
        noise: PyTorch's own relative error in each output, on real rows.

    Raises:
        ExportError: If PyTorch runs at none of the sizes.
    """

    def __init__(self, plan: Plan, verify: Verify) -> None:
        self._plan = plan
        self._verify = verify
        self.warnings: list[str] = []
        self.noise: list[float] = []
        self._sized: dict[int, Tensors] = {}
        self._ran: dict[int, _Run] = {}
        self.cases = self._make_cases()

    @property
    def budgets(self) -> dict[str, float]:
        """The widest budget of any element of each output, in units of the output.

        A case that had to be refined may have a wider one; its check says so.
        """
        names = [spec.name for spec in self._plan.signature.outputs]
        return {
            name: max(_widest(case.references[place]) for case in self.cases)
            for place, name in enumerate(names)
        }

    def judge(self, path: Path, *, staged: bool = False) -> Verdict:
        """Prove a file.

        Args:
            path: The model.
            staged: Whether its folder is ours: then a twin without weights may lie there for a
                moment, because the checker would read all of the file, twice, and ONNX Runtime
                would copy the weights of a large one, where it can map them.

        Raises:
            VerificationError: At the first disagreement, with the checks so far.
        """
        with twin_of(path) if staged else nullcontext(path) as graph:
            opset = check_graph(graph, self._plan.signature)
            model = graph if path.stat().st_size > LARGE_FILE else path
            verdict = on_each_provider(self._verify, partial(self._judge_on, model))
        return replace(verdict, opset=opset)

    def _judge_on(self, model: Path, provider: str, before: tuple[Check, ...]) -> Verdict:
        checks = before
        with closing(Session(model, provider, gpu_memory_mb=self._verify.gpu_memory_mb)) as session:
            nodes = session.placed()
            placement = placement_of(provider, nodes)
            if self._verify.providers != "auto":
                require_used(placement)
            text = elsewhere_text(placement, nodes, partial(nodes_of_sizes, model))
            for case in () if is_unused(placement) else self.cases:
                checks = (*checks, check_case(self._plan.signature, session, case, checks))
        return Verdict(
            checks=checks[len(before) :],
            placements=() if placement is None else (placement,),
            warnings=(text,) if text else (),
        )

    # --- cases ------------------------------------------------------------------------------

    def _make_cases(self) -> tuple[Case, ...]:
        wanted = list(self._wanted())
        kept: list[tuple[str, Tensors, Tensors]] = []
        seconds: list[float] = []
        for rows, inputs in wanted:
            run = self._try(rows, inputs)
            if run.outputs is not None and (rows == REAL or _all_finite(run.outputs)):
                kept.append((rows, inputs, run.outputs))
                seconds.append(run.seconds)
        self._ran.clear()
        if not any(rows == REAL for rows, _, _ in kept):
            raise ExportError("PyTorch itself does not run at any of the sizes of the proof.")
        real = [place for place, case in enumerate(kept) if case[0] == REAL]
        if all(has_no_number(kept[place][2]) for place in real):
            self.warnings.append(NO_NUMBER)
        # Real rows first, and of these the quickest: what rounding costs is seen on few rows, too,
        # but not in a number or two, which may be exact by luck.
        sizes = [sum(out.numel() for out in case[2]) for case in kept]
        order = sorted(
            range(len(kept)),
            key=lambda place: (place not in real, sizes[place] < FEW, seconds[place]),
        )
        runs = _run_double(self._plan.flat, [kept[place][1] for place in order])
        doubles = dict(zip(order, runs, strict=True))
        exact = [(kept[place][2], doubles[place]) for place in real if doubles[place]]
        self.noise = pooled_noise(
            [kept[place][2] for place in real], [doubles[place] for place in real]
        )
        return tuple(self._case(*case, exact, doubles[place]) for place, case in enumerate(kept))

    def _case(
        self,
        rows: str,
        inputs: Tensors,
        outputs: Tensors,
        exact: Sequence[tuple[Tensors, Tensors | None]],
        double: Tensors | None,
    ) -> Case:
        """Make a case of a run.

        Args:
            rows: Kind of rows.
            inputs: What was fed.
            outputs: What came out.
            exact: Outputs of each real run that was made in float64, too, with what came out then.
            double: Outputs of this run in float64, if it was made.
        """
        tolerance = self._verify.tolerance
        refine: Callable[[], tuple[Reference, ...]] | None = None
        if double is None and exact:
            references = tuple(
                pinned_reference(out, noise, tolerance, source="float32")
                for out, noise in zip(outputs, self.noise, strict=True)
            )
            # Changed rows may be out of the module's domain: their rounding says nothing of real
            # ones.
            others = exact if rows == REAL else ()
            # No method: a case that knew the proof would keep the module when both are done with.
            refine = cache(
                partial(_refined, self._plan.flat, tolerance, inputs, outputs, others, self.noise)
            )
        else:
            runs = [*exact, (outputs, double)] if rows == REAL else [(outputs, double)]
            references = _last_references(runs, tolerance)
        return Case(
            sizes=current_sizes(inputs, self._plan.axes.inputs),
            rows=rows,
            inputs=inputs,
            references=references,
            refine=refine,
        )

    def _wanted(self) -> list[tuple[str, Tensors]]:
        wanted = [self._at_batch(size) for size in self._batch_sizes()] or [self._plan.calls[0]]
        wanted += [self._affordable_call(call) for call in self._plan.calls[1:]]
        wanted += self._other_sizes()
        unique: dict[tuple[tuple[int, ...], ...], Tensors] = {}
        for inputs in wanted:
            unique.setdefault(tuple(tuple(tensor.shape) for tensor in inputs), inputs)
        cases = [(REAL, inputs) for inputs in unique.values()]
        small = self._at_batch(SMALL_BATCH)
        for name, change in VARIANTS.items():
            changed = change(small)
            if not all(torch.equal(a, b) for a, b in zip(changed, small, strict=True)):
                cases.append((name, changed))
        return cases

    def _at_batch(self, size: int) -> Tensors:
        """Real rows at another batch size; the first call where there is no batch axis."""
        if size not in self._sized:
            axes = self._plan.axes
            wanted = dict.fromkeys(axes.batches, size)
            self._sized[size] = resize(self._plan.rows, axes.inputs, wanted)
        return self._sized[size]

    def _affordable_call(self, call: Tensors) -> Tensors:
        axes = self._plan.axes
        sizes = current_sizes(call, axes.inputs)
        return resize(call, axes.inputs, {d: self._affordable(sizes[d]) for d in axes.batches})

    def _batch_sizes(self) -> tuple[int, ...]:
        batch = self._plan.axes.batch
        if batch is None:
            return ()
        if self._verify.sizes is not None:
            return self._verify.sizes
        observed = self._affordable(
            current_sizes(self._plan.calls[0], self._plan.axes.inputs)[batch]
        )
        larger = max(observed, SMALL_BATCH) + 1
        return (1, SMALL_BATCH, observed, larger + 1 - larger % 2)

    def _affordable(self, size: int) -> int:
        """Lower the observed batch size if one eager run of it would take too long."""
        if size <= SMALL_BATCH:
            return size
        run = self._try(REAL, self._at_batch(SMALL_BATCH))
        per_row = run.seconds / SMALL_BATCH if run.outputs is not None else 0.0
        most = int(self._verify.seconds_per_run / max(per_row, 1e-9))
        if size > most:
            self.warnings.append(f"Proven up to batch {max(most, 3)}, not {size}, to save time.")
        return min(size, max(most, 3))

    def _other_sizes(self) -> list[Tensors]:
        """Other sizes of each dynamic axis that is not the batch, where PyTorch accepts them."""
        axes, small = self._plan.axes, self._at_batch(SMALL_BATCH)
        sizes = current_sizes(small, axes.inputs)
        seen = [current_sizes(call, axes.inputs) for call in self._plan.calls]
        largest = {name: max(call[name] for call in seen) for name in sizes}
        others = [name for name in sizes if name not in axes.batches]
        steps = {name: (axes.steps or {}).get(name, 1) for name in others}
        changes = [{name: sizes[name] + steps[name]} for name in others]
        changes += [{name: sizes[name] - steps[name]} for name in others]
        changes += [{entry.dim: 1} for entry in axes.evidence if entry.kind == "accepted"]
        if others:
            # Beyond what was seen: a table that grew with the calls is too short there.
            changes.append({name: largest[name] + steps[name] for name in others})
            changes.append({name: 2 * largest[name] + steps[name] for name in others})
        possible = [change for change in changes if all(size > 0 for size in change.values())]
        candidates = [resize(small, axes.inputs, change) for change in possible]
        return [inputs for inputs in candidates if self._try(PROBE, inputs).outputs is not None]

    def _try(self, rows: str, inputs: Tensors) -> _Run:
        """Run once; what was run already is known."""
        if id(inputs) not in self._ran:
            start = time.perf_counter()
            outputs = self._run(rows, inputs)
            seconds = time.perf_counter() - start
            self._ran[id(inputs)] = _Run(inputs=inputs, outputs=outputs, seconds=seconds)
        return self._ran[id(inputs)]

    def _run(self, rows: str, inputs: Tensors) -> Tensors | None:
        try:
            # Another size may make the module grow a table that it keeps: what is exported later
            # must not have learnt it from here.
            return run_flat(self._plan.flat, inputs, isolate=True)
        except Exception as error:
            if rows == REAL:
                where = _where(current_sizes(inputs, self._plan.axes.inputs), rows)
                self.warnings.append(f"PyTorch itself refuses {where}: {type(error).__name__}.")
            logger.debug("eager run refused", exc_info=True)
            return None


def check_case(
    signature: ModelSignature, session: Session | Filled, case: Case, before: tuple[Check, ...]
) -> Check:
    """Run one case in ONNX Runtime and compare.

    Args:
        signature: Inputs and outputs.
        session: The model.
        case: The run.
        before: Checks made so far, for the error.

    Raises:
        VerificationError: If it disagrees or fails, with the checks so far.
    """
    where = _where(case.sizes, case.rows)
    start = time.perf_counter()
    try:
        outputs = session.run([spec.name for spec in signature.inputs], case.inputs, before)
    except VerificationError as error:
        # Of the same kind, and what else it knows.
        raise type(error)(f"At {where}, {error}", *error.args[1:]) from error
    took = round(time.perf_counter() - start, 6)
    check = _check(signature, session, case, case.references, outputs)
    if not check.ok and case.refine is not None:
        check = _check(signature, session, case, case.refine(), outputs)
    if not check.ok:
        raise VerificationError(_disagreement(check), (*before, check))
    return replace(check, seconds=took)


def _check(
    signature: ModelSignature,
    session: Session | Filled,
    case: Case,
    references: Sequence[Reference],
    outputs: Sequence[torch.Tensor],
) -> Check:
    compared = tuple(
        compare(spec.name, actual, reference)
        for spec, actual, reference in zip(signature.outputs, outputs, references, strict=True)
    )
    return Check(
        provider=session.provider,
        sizes=dict(case.sizes),
        rows=case.rows,
        reference=references[0].source,
        outputs=compared,
        ok=all(output.ok for output in compared),
    )


def has_no_number(outputs: Sequence[torch.Tensor]) -> bool:
    """Tell whether all floating-point values of a run are NaN or infinite."""
    floats = [tensor for tensor in outputs if tensor.is_floating_point() and tensor.numel()]
    return bool(floats) and not any(bool(tensor.isfinite().any()) for tensor in floats)


def _all_finite(outputs: Tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outputs if tensor.is_floating_point())


def _refined(
    flat: FlatModule,
    tolerance: Tolerance,
    inputs: Tensors,
    outputs: Tensors,
    exact: Sequence[tuple[Tensors, Tensors | None]],
    noise: list[float],
) -> tuple[Reference, ...]:
    """Return references of a run in float64, or of the run that there is.

    Args:
        flat: The module.
        tolerance: Factor of the budget.
        inputs: What was fed.
        outputs: What came out.
        exact: Outputs of the real runs before it; none, and these rows are not real ones.
        noise: PyTorch's relative error in each output; of real rows it learns from this run.
    """
    (double,) = _run_double(flat, [inputs])
    runs = [*exact, (outputs, double)]
    if exact:
        noise[:] = map(max, noise, pooled_noise(*zip(*runs, strict=True)))
    return _last_references(runs, tolerance)


def _last_references(
    runs: Sequence[tuple[Tensors, Tensors | None]], tolerance: Tolerance
) -> tuple[Reference, ...]:
    """Return the references of the last of several runs, each with what came out in float64."""
    outputs, doubles = zip(*runs, strict=True)
    return tuple(make_references(outputs, doubles, tolerance)[-1])


def _run_double(flat: FlatModule, runs: Sequence[Tensors]) -> list[Tensors | None]:
    """Run in float64, of a dear module only the first.

    Args:
        flat: The module.
        runs: Inputs of each run.

    Returns:
        The outputs; ``None`` where a run is too dear or the module does not run so.
    """
    found: list[Tensors | None] = [None] * len(runs)
    start = time.perf_counter()
    try:
        double = Float64(flat)
        for place, inputs in enumerate(runs):
            if place and time.perf_counter() - start > FLOAT64_S:
                break
            found[place] = double.run(inputs)
    except Exception:
        logger.debug("the module does not run in float64", exc_info=True)
    return found


def _widest(reference: Reference) -> float:
    budget = torch.as_tensor(reference.budget)
    return float(budget.max()) if budget.numel() else 0.0


def _where(sizes: Mapping[str, int], rows: str) -> str:
    text = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the observed sizes"
    return f"{text} ({rows} rows)" if rows != REAL else text


def _disagreement(check: Check) -> str:
    wrong = [f"output {output.name!r} {output.reason}" for output in check.outputs if not output.ok]
    return (
        f"ONNX Runtime ({check.provider}) and PyTorch disagree at "
        f"{_where(check.sizes, check.rows)}: {'; '.join(wrong)}."
    )
