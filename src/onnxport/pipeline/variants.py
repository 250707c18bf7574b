"""Smaller children of a proven model: made, proven with budgets of their own, and published."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx

from onnxport.errors import OnnxportError, PublishError
from onnxport.exporter.ownership import METADATA_PREFIX
from onnxport.exporter.writer import model_files, publish, sync_model, variant_path
from onnxport.pipeline.job import SourceLostError
from onnxport.pipeline.proof import REAL
from onnxport.report import Variant
from onnxport.validation.graph import check_graph
from onnxport.validation.latency import latencies
from onnxport.validation.session import CPU, Session
from onnxport.validation.variants import judge_variant, write_variant

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from onnxport.pipeline.job import ExportJob
    from onnxport.pipeline.metrics import MetricRun
    from onnxport.pipeline.plan import Plan
    from onnxport.pipeline.proof import Case
    from onnxport.report import Check, Latency, MetricParity

__all__ = ["Variants"]

logger = logging.getLogger(__name__)

SPEED_S = 0.5
"""For all speeds of one variant."""
PARENT = "parent"
"""Name of the model's own speed, which was measured beside that of a variant."""


@dataclass(frozen=True, slots=True)
class Variants:
    """Makes the variants of one model.

    Args:
        job: The job.
        staged: The model, proven, in a folder of ours.
        plan: Its signature, its axes and its calls.
        metrics: Runs the module's own validation.
    """

    job: ExportJob
    staged: Path
    plan: Plan
    metrics: MetricRun

    def made(
        self, cases: Sequence[Case], speeds: dict[str, tuple[Latency, ...]]
    ) -> tuple[Variant, ...]:
        """Make and prove them.

        Args:
            cases: What PyTorch gave; what was made of real rows does not count, because a variant
                is calibrated on real ones.
            speeds: Speed of each variant of this graph, where it was measured; added to.

        Raises:
            CheckpointGoneError: If the checkpoint has changed meanwhile.
        """
        real = [case for case in cases if case.rows == REAL]
        return tuple(self._one(*each, real, speeds) for each in self.job.options.variants)

    def publish(self, made: Sequence[Variant]) -> tuple[Variant, ...]:
        """Bring those that are proven under their final names.

        Args:
            made: All of them.
        """
        return tuple(self._published(each) if each.ok else each for each in made)

    def _one(
        self,
        name: str,
        budget: float,
        cases: Sequence[Case],
        speeds: dict[str, tuple[Latency, ...]],
    ) -> Variant:
        """Make and prove one.

        Raises:
            SourceLostError: If the checkpoint has changed meanwhile.
        """
        self.job.require_wanted()
        start, path = time.perf_counter(), variant_path(self.staged, name)
        variant = Variant(name=name, ok=False)
        try:
            write_variant(name, self.staged, path, self._samples())
            _sign(path, name)
            check_graph(path, self.plan.signature)
            session = Session(path, CPU)
            size = sum(file.stat().st_size for file in model_files(path))
            variant = replace(variant, bytes=size, checks=self._checks(session, budget, cases))
            variant = replace(variant, metric_parity=self._parity(path))
            if name not in speeds:
                speeds[name] = self._speeds(session, cases)
            variant = replace(variant, latencies=speeds[name], error=_why_not(variant))
        except SourceLostError:
            raise
        except Exception as error:  # the model itself is proven, and is not held back by a child
            logger.debug("There is no %s", path, exc_info=True)
            ours = isinstance(error, (OnnxportError, OSError))
            text = str(error) if ours else f"{type(error).__name__}: {error}"
            variant = replace(variant, error=text)
        seconds = round(time.perf_counter() - start, 4)
        return replace(variant, ok=variant.error is None, seconds=seconds)

    def _samples(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        names = [spec.name for spec in self.plan.signature.inputs]
        for call in self.plan.calls:
            arrays = [tensor.detach().numpy() for tensor in call]
            yield dict(zip(names, arrays, strict=True))

    def _run(self, session: Session, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return session.run([spec.name for spec in self.plan.signature.inputs], inputs)

    def _checks(self, session: Session, budget: float, cases: Sequence[Case]) -> tuple[Check, ...]:
        """Run what PyTorch was run on.

        Raises:
            VerificationError: If ONNX Runtime fails.
        """
        specs = self.plan.signature.outputs
        return tuple(
            judge_variant(
                budget, specs, self._run(session, case.inputs), case.references, case.sizes
            )
            for case in cases
        )

    def _parity(self, path: Path) -> MetricParity | None:
        return self.metrics.of(path, self.plan.signature, self.plan.flat.spec)

    def _speeds(self, session: Session, cases: Sequence[Case]) -> tuple[Latency, ...]:
        """Measure a variant and its parent in turns, on the fewest rows and on the most."""
        parent = Session(self.staged, CPU)
        rows = [case.sizes.get(self.plan.axes.batch or "", 1) for case in cases]
        by_rows = dict(sorted(zip(rows, cases, strict=True), key=lambda pair: pair[0]))
        ends = list(dict.fromkeys((*list(by_rows)[:1], *list(by_rows)[-1:])))
        found: list[Latency] = []
        for count in ends:
            inputs = by_rows[count].inputs
            ways = {
                CPU: partial(self._run, session, inputs),
                PARENT: partial(self._run, parent, inputs),
            }
            found += latencies(ways, count, budget_s=SPEED_S / len(ends))
        return tuple(found)

    def _published(self, variant: Variant) -> Variant:
        staged = variant_path(self.staged, variant.name)
        final = variant_path(self.job.path, variant.name)
        try:
            sync_model(staged)
            publish(staged, final)
        except PublishError as error:
            return replace(variant, ok=False, error=str(error))
        return replace(variant, path=str(final))


def _sign(path: Path, name: str) -> None:
    """Write into a variant that it is one; the rest of what its parent says is there already."""
    props = onnx.ModelProto()
    onnx.helper.set_model_props(props, {f"{METADATA_PREFIX}variant": name})
    with path.open("ab") as file:  # a protobuf message may be written field by field
        file.write(props.SerializeToString())


def _why_not(variant: Variant) -> str | None:
    """Return why a variant is not good enough; ``None``: it is."""
    for check in variant.checks:
        for output in check.outputs:
            if not output.ok:
                where = ", ".join(f"{name}={size}" for name, size in check.sizes.items())
                return f"Output {output.name!r}, {where or 'as seen'}: {output.reason}."
    if not variant.checks:
        return "There is nothing to compare it with."
    parity = variant.metric_parity
    if parity is not None and not parity.ok:
        return f"The module's own validation: {parity.reason}"
    return None
