"""Every kind of fault that is injected, and what comes of one injection.

A fault is a function that gets a :class:`Site`, harms a real training there, and returns an
:class:`Outcome`. The short form (``tests/faults``) injects each once; the long form
(``benchmarks/faults.py``) injects each ``times`` times, at other moments each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from faults.ground import (
    Net,
    Run,
    false_reports,
    left_behind,
    missing,
    train,
    undisturbed,
    wrong_models,
)
from onnxport import Background, OnnxExport

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

STEPS = 8
"""Of a training that is harmed: four checkpoints, each of them saved a second time as ``last``."""

_MISSING = "checkpoint without model"

PATIENT = Background(drain_s=120.0)


@dataclass(frozen=True)
class Outcome:
    """What came of an injection.

    Args:
        fired: What went wrong, as far as anybody knows; empty: the fault has missed.
        problems: Which promises were broken.
        failed: How many checkpoints had no model when training was over.
    """

    fired: str
    problems: list[str] = field(default_factory=list)
    failed: int = 0


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Args:
        name: What happens.
        area: To what.
        lost: What it may cost, in words; empty: nothing.
        inject: Does it.
        times: How often in the long form.
    """

    name: str
    area: str
    lost: str
    inject: Callable[[Site], Outcome]
    times: int


@dataclass
class Site:
    """Where a fault is injected.

    Args:
        folder: An empty folder.
        random: Decides on moments.
    """

    folder: Path
    random: random.Random
    models: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / "checkpoints"

    def export(self, **options: Any) -> OnnxExport:
        """Return the callback that is tried: by default trace in the worker, without MLflow."""
        chosen = {"core": "trace", "background": PATIENT, "mlflow": False, "dirpath": self.models}
        return OnnxExport(**{**chosen, **options})

    def train(
        self,
        *callbacks: Any,
        export: OnnxExport | None = None,
        steps: int = STEPS,
        make: Callable[[], Any] = Net,
        **options: Any,
    ) -> Run:
        """Train with the callback."""
        export = self.export() if export is None else export
        return train(self.checkpoints, export, *callbacks, steps=steps, make=make, **options)

    def judge(
        self,
        run: Run,
        fired: str,
        *,
        losses: tuple[float, ...] | None = None,
        error: type[BaseException] | None = None,
        make: Callable[[], Any] = Net,
        reported: bool = True,
        again: bool = True,
        owed: bool = True,
    ) -> Outcome:
        """Look at what a training has left, then at what the next start leaves.

        Args:
            run: The training.
            fired: What went wrong.
            losses: What they must be; default: as without callback and fault.
            error: What the fault itself makes of the training.
            make: Makes the module.
            reported: Whether each checkpoint must have a report.
            again: Whether to start again.
            owed: Whether the next start must make what is missing.
        """
        wanted = undisturbed(STEPS) if losses is None else losses
        problems = []
        if tuple(run.losses) != wanted[: len(run.losses)]:
            problems.append("training computes something else")
        if error is None and (run.error is not None or len(run.losses) != len(wanted)):
            problems.append(f"training ended by {run.error!r} after {len(run.losses)} steps")
        if error is not None and not isinstance(run.error, error):
            problems.append(f"training ended by {run.error!r}, not {error.__name__}")
        problems += self.wrong(run, make)
        failed = len(missing(self.models or self.checkpoints, self.checkpoints))
        if reported and failed and not any(report.error for report in run.reports):
            problems.append(f"{failed} checkpoints have no model, and no report says why")
        if again:
            found = self.start_again(make)
            problems += [text for text in found if owed or not text.endswith(_MISSING)]
        return Outcome(fired, problems, failed)

    def wrong(self, run: Run | None = None, make: Callable[[], Any] = Net) -> list[str]:
        """Return what may never be in the folder."""
        models = self.models or self.checkpoints
        if not models.is_dir():
            return []
        reports = () if run is None else run.reports
        return wrong_models(models, self.checkpoints, make) + false_reports(models, reports)

    def start_again(self, make: Callable[[], Any] = Net) -> list[str]:
        """Train once more, without a fault; return what is wrong then."""
        export = self.export(background=False)
        run = self.train(export=export, steps=STEPS + 4, make=make)
        models = self.models or self.checkpoints
        problems = self.wrong(run, make) + missing(models, self.checkpoints)
        problems += left_behind(models) + left_behind(self.checkpoints)
        problems += [str(report.error) for report in run.reports if not report.ok]
        if run.error is not None:
            problems.append(f"it ended by {run.error!r}")
        return [f"after the next start: {text}" for text in problems]


CATALOGUE: list[Fault] = []


def fault(
    area: str, name: str, *, times: int = 10, lost: str = "", **options: Any
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Put a function into the catalogue; it may be there many times with other options.

    Args:
        area: What is harmed.
        name: What happens.
        times: How often in the long form.
        lost: What it may cost.
        options: For the function.
    """

    def register(inject: Callable[..., Outcome]) -> Callable[..., Outcome]:
        CATALOGUE.append(Fault(name, area, lost, partial(inject, **options), times))
        return inject

    return register
