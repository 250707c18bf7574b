"""The module's own validation, run with PyTorch and with the model that was made of it."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from onnxport.exporter.module_state import evaluate
from onnxport.exporter.target import find_target
from onnxport.pipeline.job import VALIDATE, CheckpointGoneError, ModuleMissingError
from onnxport.pipeline.stand_in import StandIn, put_in_place
from onnxport.report import MetricParity
from onnxport.validation.metrics import compare_metrics
from onnxport.validation.session import CPU, Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from onnxport.config import Metrics
    from onnxport.pipeline.job import ExportJob, Validation
    from onnxport.report import MetricPair
    from onnxport.signature import ModelSignature
    from onnxport.tree import Spec

__all__ = ["MetricRun"]

logger = logging.getLogger(__name__)


class MetricRun:
    """The validation of one job: with PyTorch once, and with any number of models.

    Args:
        job: The job; where no validation was asked for, nothing is run.
    """

    def __init__(self, job: ExportJob) -> None:
        self._job = job
        self._expected: Mapping[str, float] | None = None

    def of(self, model: Path, signature: ModelSignature, spec: Spec) -> MetricParity | None:
        """Run the module's own validation, and compare what it logs.

        Args:
            model: A model that was proven.
            signature: Its inputs and outputs.
            spec: Structure of the calls that it takes.

        Returns:
            What came of it, also where it could not be run; ``None``: it was not asked for.

        Raises:
            CheckpointGoneError: If the checkpoint has changed meanwhile.
        """
        validation, options = self._job.validation, self._job.options.metrics
        if validation is None or options is None:
            return None
        start = time.perf_counter()
        reason = self._why_not(validation)
        found = None if reason else self._made(validation, options, model, signature, spec)
        found = found or _not_run(reason)
        return replace(found, seconds=round(time.perf_counter() - start, 4))

    def _why_not(self, validation: Validation) -> str:
        """Run it with PyTorch, once; return why that says nothing.

        Raises:
            CheckpointGoneError: If the checkpoint has changed meanwhile.
        """
        if VALIDATE in self._job.skip:
            return "It has ended the worker process, and was not tried again."
        if not isinstance(self._job.target, str):
            return "What target= makes of the module is not what its validation runs."
        if self._expected is not None:
            return ""
        try:
            self._expected = validation(self._module())
        except CheckpointGoneError:
            raise
        except ModuleMissingError:
            return "The module cannot be sent to the worker process."
        except Exception as error:  # the user's steps and hooks
            logger.debug("The validation could not be repeated.", exc_info=True)
            return f"It cannot be repeated: {type(error).__name__}: {error}"
        return ""

    def _made(
        self,
        validation: Validation,
        options: Metrics,
        model: Path,
        signature: ModelSignature,
        spec: Spec,
    ) -> MetricParity:
        """Run it with a model.

        Raises:
            CheckpointGoneError: If the checkpoint has changed meanwhile.
        """
        target = str(self._job.target)
        try:
            copy = self._module()
            twin = evaluate(find_target(self._module(), target))
            stand_in = StandIn(Session(model, CPU), signature, spec, twin)
            put_in_place(find_target(copy, target), stand_in)
            actual = validation(copy)
        except CheckpointGoneError:
            raise
        except Exception as error:  # the user's steps and hooks, and a model that does not fit
            logger.debug("The validation could not be run with the model.", exc_info=True)
            return _not_run(f"It fails with the model: {type(error).__name__}: {error}")
        pairs = compare_metrics(self._expected or {}, actual, options, self._job.provenance)
        reason = _judged(pairs, stand_in.calls)
        return MetricParity(
            provider=CPU,
            batches=validation.count,
            calls=stand_in.calls,
            metrics=pairs,
            ok=not reason,
            reason=reason,
        )

    def _module(self) -> nn.Module:
        return self._job.source.module()[0]


def _judged(pairs: Sequence[MetricPair], calls: int) -> str:
    """Return why metrics do not speak for a model; ``""``: they do."""
    if not calls:
        return "The validation never runs what was exported, so it says nothing of the model."
    if not pairs:
        return "The validation logs nothing, so there is nothing to compare."
    return "; ".join(f"{pair.name} {pair.reason}" for pair in pairs if not pair.ok)


def _not_run(reason: str) -> MetricParity:
    return MetricParity(provider=CPU, batches=0, calls=0, metrics=(), ok=False, reason=reason)
