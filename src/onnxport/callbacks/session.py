"""What every adapter shares: one training run and the models that come out of it.

An adapter tells the session what happens (a batch begins, a checkpoint was saved or removed,
training ends); the session observes, exports, tracks and keeps the reports. Once it is made, none
of its methods raises: failures are reported, and handed out by :meth:`ExportSession.take_failure`.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnxport._events import NOT_WANTED, event
from onnxport._files import is_there
from onnxport._signals import is_of_handler
from onnxport._torch_compat import plain_name
from onnxport.api import read_examples
from onnxport.callbacks.kept import KeptReports
from onnxport.callbacks.live import LiveModule
from onnxport.callbacks.options import DRAIN_AFTER_ERROR_S
from onnxport.callbacks.owed import (
    NO_USE,
    SharedTemplate,
    is_owed,
    note,
    owed,
    settle,
    sweep,
    template_path,
    ticket,
)
from onnxport.callbacks.paths import is_model_of
from onnxport.callbacks.reference import Reference
from onnxport.callbacks.refused import hand_in
from onnxport.callbacks.runner import InlineRunner, Outcome
from onnxport.callbacks.turns import Turns
from onnxport.callbacks.unnoted import Unnoted
from onnxport.callbacks.withdrawals import Withdrawals
from onnxport.errors import OnnxportError, PublishError, WorkerError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.fingerprint import fingerprint
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.module_state import copy_module, evaluate
from onnxport.exporter.target import is_method, require_target
from onnxport.exporter.tied import tied_names, with_tied
from onnxport.exporter.unsharded import uncast
from onnxport.inputs.leave_out import leave_out
from onnxport.inputs.observe import Observer, unobserved
from onnxport.inputs.observe_method import MethodObserver
from onnxport.inputs.record import small_copy
from onnxport.pipeline import ExportJob
from onnxport.pipeline.report_files import save_report
from onnxport.report import ExportReport, Provenance
from onnxport.tracking.base import Model, RunAddress, place_of
from onnxport.tracking.job import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    import numpy as np
    from torch import nn

    from onnxport.callbacks.page import RunPage
    from onnxport.callbacks.remote import RemoteModels
    from onnxport.callbacks.runner import Finished, Runner
    from onnxport.config import ExportOptions
    from onnxport.errors import ExportError
    from onnxport.exporter.target import Target
    from onnxport.pipeline import LiveReference, Validation
    from onnxport.report import TrackingRecord
    from onnxport.tracking.outbox import Outbox
    from onnxport.tree import Example

__all__ = ["ExportSession", "Saved"]

logger = logging.getLogger(__name__)

_MAY_PASS = frozenset({PublishError.code, WorkerError.code})
"""Failures of a disk or a worker; the model is owed still."""

MAX_REHEARSALS = 3
"""Steps that are run on a copy to see calls that are compiled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A set of weights that should become a model.

    Args:
        state: The checkpoint's ``state_dict``.
        path: Where the model goes.
        origin: Where the weights come from.
        file: A file that holds the ``state_dict`` as ``torch.save`` writes it, or ``None``.
        reference: What the module computed with them, where it cannot be asked any more.
        fingerprint: What of the module was no weight then.
        module: What stands for the module in training, where that is spread over processes.
        validation: What the model is validated with, or ``None``.
    """

    state: Mapping[str, Any]
    path: Path
    file: Path | None = None
    reference: LiveReference | None = None
    fingerprint: Mapping[str, str] | None = None
    module: nn.Module | None = None
    validation: Validation | None = None
    origin: Provenance = field(default_factory=Provenance)


@dataclass(frozen=True, slots=True)
class _Begun:
    """The last model that was begun under a name."""

    place: int
    origin: Provenance


@dataclass(frozen=True, eq=False, slots=True)
class _Tracked:
    """The last proven model under a name."""

    report: ExportReport
    origin: Provenance
    place: int
    row: Mapping[str, np.ndarray[Any, Any]] | None


class ExportSession:
    """One training run.

    Args:
        module: The live module.
        options: How to export.
        target: What to export; ``None``: find a submodule by watching.
        outbox: Takes what a tracking server is to be told of proven models, or ``None``.
        address: Which run that is.
        is_redirected: See :class:`~onnxport.inputs.observe.Observer`.
        fallback: Gives an example when no call was observed, or ``None``.
        labels: Names the arguments of a module's ``forward`` that a deployed model does not get.
        say: Tells the user one line per model.
        runner: Where models are made; default: here.
        name: What follows the names of its models.
        turns: Shared by all sessions of a run.
        remote: Knows which models belong elsewhere.
        page: Shows what becomes of each checkpoint, or ``None``.

    Attributes:
        preflight: The report of the trial before the first checkpoint, when there was one.
        dropped: How many models were not made, because their checkpoints went before.

    Raises:
        ConfigurationError: If the target does not exist.
    """

    def __init__(  # noqa: PLR0913 - what a run is about, by keyword
        self,
        module: nn.Module,
        options: ExportOptions,
        *,
        target: Target | None = None,
        outbox: Outbox | None = None,
        address: RunAddress | None = None,
        is_redirected: Callable[[nn.Module], bool] = lambda _: False,
        fallback: Callable[[], Any] = lambda: None,
        labels: Callable[[nn.Module], Collection[str]] = lambda _: (),
        say: Callable[[str], None] = logger.info,
        runner: Runner | None = None,
        name: str = "",
        turns: Turns | None = None,
        remote: RemoteModels | None = None,
        page: RunPage | None = None,
    ) -> None:
        self._remote = remote
        self._page = page
        self._origins: dict[int, Provenance] = {}
        self._turns = Turns() if turns is None else turns
        self._kept = KeptReports(say, self._show)
        self.preflight: ExportReport | None = None
        self._module = module
        self._options = options
        self._target = target
        self._outbox = outbox
        self._address = address or RunAddress(uri="")
        self._fallback, self._labels = fallback, labels
        self._runner = InlineRunner() if runner is None else runner
        self._name = name
        self._recovered = self._looks_away = False
        self._id = secrets.token_hex(4)
        self.dropped = 0
        self._folders: set[Path] = set()
        self._template = SharedTemplate(self._id)
        self._latest: dict[Path, _Begun] = {}
        self._given_up: set[Path] = set()
        self._small: Example | None = None
        self._preflight_begun = False
        self._reference = Reference()
        self._rehearsals = MAX_REHEARSALS
        self._tracked: dict[Path, _Tracked] = {}
        self._withdrawals = Withdrawals(name)
        self._unnoted = Unnoted(name)
        if target is not None:
            require_target(module, target)
        self._observer = _observer(module, target, is_redirected)
        if options.inputs.example is None or callable(target):
            self._observer.start()

    def _show(self, report: ExportReport, place: int) -> None:
        """Put a report on the page; a trial has no place there."""
        origin = self._origins.get(place)
        if self._page is not None and origin is not None:
            try:
                self._page.add(report, origin)
            except Exception:  # a page is no reason to lose what became of a model
                logger.exception("%s is not on the page of the run.", report.path)

    # --- what the adapter tells -------------------------------------------------------------

    def begin_batch(self, batch: Any, step: Callable[[Any, Any], Any] | None = None) -> None:
        """A batch was moved to its device and a step begins.

        Args:
            batch: The batch.
            step: Runs the step on a copy of the module with a copy of the batch. It is used where
                ``torch.compile`` hides the calls of the module itself, and for methods.
        """
        self._look_on()
        if not self._observer.active:
            return
        try:
            self._observer.begin_batch(batch)
            if step is not None and self._rehearsals and self._observer.needs_rehearsal:
                self._rehearsals -= 1
                self._rehearse(small_copy(batch), step)
        except Exception:
            logger.debug("the batch could not be walked", exc_info=True)

    def _rehearse(self, batch: Any, step: Callable[[Any, Any], Any]) -> None:
        with self._unobserved(), preserved_globals():
            copy = evaluate(copy_module(self._module))
            # A step may wait for other processes, which do not rehearse.
            hurry = torch.distributed.is_available() and torch.distributed.is_initialized()
            with torch.inference_mode(False), torch.no_grad():
                self._observer.rehearse(copy, batch, lambda: step(copy, batch), hurry=hurry)

    def _look_away(self) -> None:
        """Take the hooks off until the next batch: a checkpoint may hold the module as it is."""
        if self._observer.active:
            self._observer.stop()
            self._looks_away = True

    def _look_on(self) -> None:
        if self._looks_away:
            self._looks_away = False
            self._observer.start()

    def stop_observing(self) -> None:
        """Remove the hooks, if a call was seen."""
        self._look_on()
        if self._observer.choose() is not None:
            self._observer.stop()

    def saved(self, saved: Saved, *, alive: bool = True) -> None:
        """Weights were saved: export, prove, publish and track them, now or soon.

        Args:
            saved: The weights.
            alive: Whether they are of this moment, so that the module in training can be asked what
                it computes with them.
        """
        self._turns.take(partial(self._saved, saved, alive=alive))

    def _saved(self, saved: Saved, *, alive: bool) -> None:
        start = time.perf_counter()
        place = self._kept.next_place()
        path, origin = saved.path, saved.origin  # not the weights: what waits must not hold them
        seconds: dict[str, float] = {}

        def finished(outcome: Outcome) -> None:
            report = outcome.report
            self._small = outcome.example or self._small
            # Else the file was saved again, and is owed anew; or the module is not as it was then;
            # or the worker had too little memory or time, or the disk was full: another run may
            # have more.
            refused = report is not None and report.code in _MAY_PASS
            paid = report is None or report.ok or (alive and not refused)
            latest = self._latest[path].place == place
            if latest and paid:
                settle(path)
            if report is None:
                event("model.dropped", model=path, reason=NOT_WANTED)
                self.dropped += 1
                return
            seconds["total"] = time.perf_counter() - start
            if report.ok:
                self._made(path, latest=latest)
            if report.ok and self._remote is not None:  # an upload may take long
                report = self._remote.deliver(report, path)
                if report is None:
                    return
            elif not report.ok:
                report = self._refuse(path, origin, report, owed=refused, latest=latest)
            self._kept.keep(report, seconds, place)
            if report.ok and self._outbox is not None:
                self._tracked[path] = _Tracked(report, origin, place, outcome.row)
                self._track(path)

        self._latest[path] = _Begun(place, origin)
        self._origins[place] = origin
        self._withdrawals.forget(path)
        event("model.begun", model=path, checkpoint=origin.checkpoint, step=origin.global_step)
        self._begin(saved, finished, alive=alive)
        seconds["stall"] = time.perf_counter() - start

    def _made(self, path: Path, *, latest: bool) -> None:
        self._template.made(path.parent)
        self._withdrawals.published(path)
        if latest:
            self._unnoted.settle(path)

    def _refuse(
        self, path: Path, origin: Provenance, report: ExportReport, *, owed: bool, latest: bool
    ) -> ExportReport:
        """Leave a report where a model would be.

        Args:
            path: Of the model.
            origin: Where its weights come from.
            report: Says why there is none.
            owed: It may be made at another time.
            latest: The checkpoint has not been saved again.
        """
        # An older model would hold other weights; a worker that died has not removed it.
        self._remove(path, again=latest)
        if owed and latest:
            self._unnoted.owe(path, origin)
        elif latest:
            self._unnoted.removed(path)
        if owed:
            report = replace(report, error=f"{report.error}{self._way_out(path)}")
        save_report(report, path)
        return report

    def dry_run(self, saved: Saved) -> None:
        """Prove that the module exports; the report names no file, nothing is tracked."""
        start = time.perf_counter()
        place = self._kept.next_place()

        def finished(outcome: Outcome) -> None:
            if outcome.report is not None:
                self._kept.keep(outcome.report, {"total": time.perf_counter() - start}, place)

        self._turns.take(partial(self._begin, saved, finished, publish=False))

    def try_early(self, saved: Saved, failed: Callable[[ExportReport], None]) -> None:
        """Prove that the module exports, as soon as calls were seen; once.

        Args:
            saved: The weights as they are, and where a model would go.
            failed: Called, perhaps by another thread, with the report if it does not export. A
                worker or a disk that fails does not say that.
        """
        if self._preflight_begun or self._observer.choose() is None:
            return
        self._preflight_begun = True

        def finished(outcome: Outcome) -> None:
            self._small = outcome.example or self._small
            self.preflight = report = outcome.report
            if report is None or report.ok:
                return
            if report.code in {WorkerError.code, PublishError.code}:
                text = (
                    "Whether the module exports is not known yet [%s]; each checkpoint tries it: %s"
                )
                logger.warning(text, report.code, report.error)
            else:
                self._kept.tried(report)
                failed(report)

        self._turns.take(partial(self._begin, saved, finished, publish=False))

    @property
    def reports(self) -> list[ExportReport]:
        """One report per attempted checkpoint, in the order in which they were begun."""
        return self._kept.reports

    @property
    def last(self) -> ExportReport | None:
        """The report that came last."""
        return self._kept.last

    @property
    def awaits_trial(self) -> bool:
        """Whether calls were seen and the module was not tried yet."""
        return not self._preflight_begun and self._observer.choose() is not None

    def recover(
        self,
        folders: Iterable[Path],
        model_of: Callable[[str], Path],
        is_ours: Callable[[Path], bool] = lambda _: True,
    ) -> None:
        """Make the models that an earlier run owes, once calls were seen; once.

        Args:
            folders: Of checkpoints and models.
            model_of: Where this run has the model of a checkpoint.
            is_ours: Tells whether a model is none of another callback of this run.
        """
        if self._recovered or self._observer.choose() is None:
            return
        self._recovered = True
        folders = list(folders)
        hand_in(folders, self._name, model_of, self._takes_care_of)
        for debt in list(owed(folders, self._name, _say_unclear)):
            path, origin, file = debt.model, debt.origin, debt.checkpoint
            if path in self._latest or not is_ours(path):  # of this run, and on its way
                continue
            event("model.owed", model=path, checkpoint=file)
            self._folders.add(path.parent)
            try:
                found = read_state_dict(file)
            except (OnnxportError, OSError) as error:
                self.failed(str(error), origin)
                settle(path)
                continue
            state = with_tied(found, tied_names(self._module))
            saved = Saved(
                state=state,
                path=path,
                origin=origin,
                file=file if file.is_file() and len(found) == len(state) else None,
                reference=debt.reference,
                fingerprint=debt.fingerprint,
            )
            self.saved(saved, alive=False)

    def _takes_care_of(self, path: Path, note_beside: Path) -> bool:
        """Take over an earlier run's note of a model that this one has begun, or has made."""
        if path not in self._latest:
            return False
        self._unnoted.adopt(path, note_beside)
        if is_owed(path) or self._withdrawals.has_published(path):
            self._unnoted.settle(path)
        return True

    def _begin(
        self, saved: Saved, finished: Finished, *, publish: bool = True, alive: bool = True
    ) -> None:
        """Hand a job to the runner; what goes wrong on the way there is a failed report.

        Raises:
            SystemExit: If a handler of a signal has raised it.
        """
        try:
            with self._unobserved(), unobserved():
                job, live = self._job(saved, alive=alive)
                if publish:
                    self._folders.add(saved.path.parent)
                    job = self._noted(job, saved, alive=alive)
                self._runner.run(replace(job, publish=publish), live, saved.file, finished)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and is_of_handler(error):
                raise  # somebody ends training, and not the module that is run for a model
            logger.debug("The export could not start", exc_info=True)
            finished(Outcome(ExportReport.of_failure("", saved.origin).failed(error)))

    def _noted(self, job: ExportJob, saved: Saved, *, alive: bool) -> ExportJob:
        """Note how a model can be made later, and where its graph will lie."""
        if self._is_elsewhere(saved.path):  # its checkpoint cannot be read from a folder
            return job
        job = replace(job, template=template_path(saved.path, self._id))
        if alive:  # what another run has noted says more
            address = None if self._outbox is None else self._address
            how = None if job.reference is None else job
            note(saved.path, self._name, saved.origin, how, address)
            self._template.noted(saved.path.parent)
        return replace(job, ticket=ticket(saved.path))

    def _is_elsewhere(self, path: Path) -> bool:
        return self._remote is not None and self._remote.url(path) is not None

    def failed(self, error: str, origin: Provenance) -> None:
        """Weights should become a model and cannot even be had."""
        report, place = ExportReport.of_failure(error, origin), self._kept.next_place()
        self._origins[place] = origin
        self._kept.keep(report, {"total": 0.0}, place)

    def saving(self, path: Path, checkpoint: str) -> None:
        """A checkpoint is about to be saved: its model is owed, and is not what has its name now.

        So whoever is killed at any moment leaves no model beside other weights than its own, and no
        checkpoint without a model that nobody knows of.

        Args:
            path: Where the model will lie.
            checkpoint: The checkpoint.
        """
        self._look_away()
        if not self._is_elsewhere(path):
            self._withdraw(path, checkpoint)

    def removing(self, path: Path, checkpoint: str) -> None:
        """A checkpoint is about to be removed, and its model is before that.

        Args:
            path: The model; files that are none of ours stay.
            checkpoint: The checkpoint.
        """
        if not self._is_elsewhere(path) and (is_there(path) or is_owed(path)):
            self._withdraw(path, checkpoint)

    def _withdraw(self, path: Path, checkpoint: str) -> None:
        self._unnoted.forget(path)
        if self._withdrawals.withdraw(path, checkpoint):
            self._unnoted.settle(path)
        else:
            self._unnoted.keep(path, checkpoint)
        self._runner.forget(path)
        self._try_again()

    def _try_again(self) -> None:
        """Do what the disk has refused before."""
        self._withdrawals.try_again()
        self._unnoted.try_again()

    def pass_over(self, path: Path) -> None:
        """A checkpoint was saved of which no model is wanted: none is owed.

        Args:
            path: Where the model would lie.
        """
        if self._withdrawals.forget(path) is not None:
            settle(path)
            self._unnoted.removed(path)

    def removed(self, path: Path, checkpoint: str | None = None) -> None:
        """A checkpoint was removed: remove its model.

        Args:
            path: The model; files that are none of ours stay.
            checkpoint: If given, the model of another checkpoint stays, too.
        """
        self._runner.forget(path)
        settle(path)
        withdrawn = self._withdrawals.forget(path)
        if withdrawn or checkpoint is None or is_model_of(path, Path(checkpoint)):
            event("model.removed", model=path)
            self._remove(path)
        elif self._remote is not None:  # another run may have made it
            self._remote.remove(path, checkpoint)
        self._unnoted.removed(path)

    def _remove(self, path: Path, *, again: bool = True) -> None:
        if self._outbox is not None:
            self._tracked.pop(path, None)
            gone = Job(model=path.absolute(), place=place_of(path), address=self._address)
            self._outbox.submit(gone, lambda _: None)
        self._withdrawals.remove(path, again=again)
        if self._remote is not None:
            self._remote.remove(path)

    def drain(self, limit_s: float, tell: Callable[[list[str]], None] = lambda _: None) -> None:
        """Wait for the models that are not finished.

        Args:
            limit_s: How long at most, in seconds.
            tell: Called now and then with what is being done for each of them.
        """
        self._observer.stop()
        self._looks_away = False
        self._kept.over = True
        for path in dict.fromkeys(self._runner.wait(limit_s, tell)):
            if path in self._given_up:
                continue
            self._given_up.add(path)
            text = (
                f"{path} was not finished while the end of training waited: at most "
                f"Background(drain_s=), and {DRAIN_AFTER_ERROR_S:.0f} s after Ctrl-C or an error."
            )
            origin = self._latest[path].origin
            report = ExportReport.of_failure(text + self._way_out(path), origin, WorkerError.code)
            self._kept.keep(report, {"total": limit_s}, self._latest[path].place)

    def _way_out(self, path: Path) -> str:
        """Return a sentence on who makes a model that is owed."""
        if not is_owed(path) and not self._unnoted.is_beside(path):
            return ""
        resume = f"`onnxport resume {path.parent}` or the next fit"
        if not is_owed(path) or not is_there(template_path(path, self._id)):
            resume = "The next fit"  # there is no graph that weights could be filled into
        return f" {resume} with this checkpoint folder makes it."

    @property
    def unfinished(self) -> list[str]:
        """What is being done for each model that is not finished."""
        return self._runner.unfinished()

    def finish(self, best: Path | None = None) -> None:
        """Training is over: remove all hooks, and say which model is the best.

        Args:
            best: The model of the best checkpoint, if known.
        """
        self._observer.stop()
        self._looks_away = False
        self._runner.close()
        self._try_again()
        sweep(self._folders)
        if best in self._tracked and self._address.waits_for_best:
            self._track(best, last=True)

    def take_failure(self) -> ExportError | None:
        """Return the first failure that was not taken yet."""
        return self._kept.take_failure()

    # --- the work ---------------------------------------------------------------------------

    def _job(self, saved: Saved, *, alive: bool) -> tuple[ExportJob, LiveModule]:
        watched = self._target if isinstance(self._target, str) else self._observer.choose() or ""
        module = self._module if saved.module is None else saved.module
        observed = self._observed(watched)
        if saved.module is not None:
            observed = tuple(uncast(call, module) for call in observed)
        examples = self._given() or observed or self._from_fallback()
        # Of what wraps the module, the module's own calls are compared.
        runs = observed if callable(self._target) else examples
        if self._small is not None and runs:
            runs = (self._small,)
        reference, idle = self._reference.run(module, watched, runs if alive else (), saved.state)
        live = LiveModule(module, saved.state, tuple(idle))
        job = ExportJob(
            source=live,
            examples=examples,
            path=saved.path,
            options=self._options,
            target=self._target if callable(self._target) else plain_name(watched),
            provenance=saved.origin,
            reference=reference if alive else saved.reference,
            fingerprint=fingerprint(module),
            then=saved.fingerprint,
            validation=saved.validation,
        )
        return job, live

    def _given(self) -> tuple[Example, ...]:
        given = self._options.inputs.example
        return () if given is None else read_examples(given)

    def _observed(self, target: str) -> tuple[Example, ...]:
        recorder = self._observer.recorders.get(target)
        calls = () if recorder is None else tuple(recorder.examples)
        if isinstance(self._observer, MethodObserver):
            return calls
        return self._without_labels(calls, self._module.get_submodule(target))

    def _from_fallback(self) -> tuple[Example, ...]:
        given = self._fallback()
        return () if given is None else self._without_labels(read_examples(given), self._module)

    def _without_labels(self, calls: Iterable[Example], module: nn.Module) -> tuple[Example, ...]:
        chosen = self._options.inputs.leave_out
        names = self._labels(module) if chosen is None else chosen
        return tuple(leave_out(call, names, module.forward) if names else call for call in calls)

    def _track(self, path: Path, *, last: bool = False) -> None:
        """Note that a server should hold a model; a model that is gone meanwhile is none."""
        found = self._tracked[path]
        model = Model.of_file(path, found.report, found.origin, found.row)
        if model is None or self._outbox is None:
            return

        def told(record: TrackingRecord) -> None:
            report = self._kept.update(found.place, record)
            if report is not None and self._tracked.get(path) is found and is_there(path):
                save_report(report, path)
                if self._remote is not None:
                    self._remote.update(path)

        self._outbox.submit(
            Job(
                model=model.path,
                place=model.place,
                address=self._address,
                content=model,
                last=last,
            ),
            told,
        )

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        """Our own runs are no observations, and a copy of the module must not hold our hooks."""
        active = self._observer.active
        self._observer.stop()
        try:
            yield
        finally:
            if active:
                self._observer.start()


def _say_unclear(model: Path, why: str) -> None:
    logger.warning("%s is owed by an earlier run and is not made: %s %s", model, why, NO_USE)


def _observer(
    module: nn.Module, target: Target | None, is_redirected: Callable[[nn.Module], bool]
) -> Observer | MethodObserver:
    """Choose how calls are watched: by hooks, or for a method, on copies."""
    if isinstance(target, str) and is_method(module, target):
        owner, _, method = target.rpartition(".")
        return MethodObserver(plain_name(owner), method)
    targets = (target,) if isinstance(target, str) else None
    return Observer(module, targets=targets, is_redirected=is_redirected)
