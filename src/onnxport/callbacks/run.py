"""One training of any framework, with all its targets: what an adapter tells becomes models.

Nothing that an adapter tells raises: what an export can raise is in its report, and the rest is
logged, with its traceback. What should end training all the same is handed out by
:meth:`ExportRun.take_failure`.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.announced import Announced
from onnxport.callbacks.drain import drain
from onnxport.callbacks.links import follow_link, remove_link
from onnxport.callbacks.options import DRAIN_AFTER_ERROR_S
from onnxport.callbacks.paths import ModelPaths
from onnxport.callbacks.remote import RemoteModels, folder_here, is_remote
from onnxport.callbacks.runner import InlineRunner, WorkerRunner
from onnxport.callbacks.session import ExportSession, Saved
from onnxport.callbacks.summary import show, status_of
from onnxport.callbacks.training import never_raises
from onnxport.callbacks.turns import Turns
from onnxport.errors import ExportError, PublishError
from onnxport.exporter.weights import weights_sha256
from onnxport.report import ExportReport, Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from onnxport.callbacks.runner import Runner
    from onnxport.callbacks.settings import Settings
    from onnxport.callbacks.training import Training, Weights
    from onnxport.exporter.target import Target

__all__ = ["ExportRun"]

logger = logging.getLogger(__name__)

OBSERVED_FIRST = 2
"""Batches that are seen before the export is tried."""

WATCHED = 200
"""Batches after which calls are watched no more than to the end of the epoch: a small data set may
show its other sizes in a later epoch only."""

HAND_OVER_S = 300.0
"""How long a checkpoint that is handed over waits for its model: other processes wait meanwhile,
and are ended after ten minutes by default (NCCL)."""

PAUSE_S = 0.02
"""How often it looks."""

SAME_NAMES = (
    "Two OnnxExport callbacks of one trainer would write the same files, so only the first of them "
    "works. Give them another dirpath= or another target=."
)


class ExportRun:
    """One training, in the process that writes its checkpoints.

    Args:
        settings: What the callback was told.
        training: What its adapter knows; ``None``: models are made in another process, or nowhere,
            and whatever is told leads to nothing.

    Attributes:
        saves: How many checkpoints were asked about.
        batches: How many batches have begun.

    Raises:
        ConfigurationError: If a target does not exist.
    """

    def __init__(self, settings: Settings, training: Training | None = None) -> None:
        self._settings, self._training = settings, training
        self.saves = self.batches = 0
        self._linked = 0
        self._ended = self._failed = False
        self._early_failure: ExportError | None = None
        self._announced = Announced(settings, training if _has_place(training) else None)
        self._sessions: dict[str, ExportSession] = {}
        self._refused: list[ExportReport] = []
        self._say = logger.info if training is None else training.say
        root = "" if training is None else training.root
        self._folder = folder_here(root)
        self._remote = RemoteModels(self._folder / "onnxport-remote")
        roots = () if training is None else training.roots
        self._paths = ModelPaths(settings.dirpath, roots, self._remote)
        if training is None:
            return
        if training.place is None:
            logger.warning("%s Training goes on.", SAME_NAMES)
            self._refused.append(ExportReport(ok=False, error=SAME_NAMES))
            return
        turns = Turns()
        for number, (name, target) in enumerate(settings.targets.items()):
            self._sessions[name] = self._session(training, number, name, target, turns)

    def _session(
        self, training: Training, number: int, name: str, target: Target | None, turns: Turns
    ) -> ExportSession:
        address = self._announced.address
        return ExportSession(
            training.module,
            self._settings.options,
            target=target,
            outbox=self._announced.outbox,
            address=None if address is None else address.named(name),
            is_redirected=training.is_redirected,
            fallback=training.fallback,
            labels=training.labels,
            say=self.say,
            runner=self._runner(training.module, number),
            name=name,
            turns=turns,
            remote=self._remote,
            page=self._announced.page,
        )

    def _runner(self, module: nn.Module, number: int) -> Runner:
        if self._settings.background is None:
            return InlineRunner()
        return WorkerRunner(self._settings.background, module, number)

    # --- what it is -------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether models are made here."""
        return bool(self._sessions)

    @property
    def reports(self) -> list[ExportReport]:
        """One report per attempted checkpoint, in order."""
        now = [session.reports for session in self._sessions.values()]
        return [*self._refused, *(r for group in zip_longest(*now) for r in group if r is not None)]

    @property
    def preflight_reports(self) -> list[ExportReport]:
        """What came of the export before the first checkpoint, one per target."""
        tried = [session.preflight for session in self._sessions.values()]
        return [report for report in tried if report is not None]

    @property
    def status(self) -> str:
        """What became of the checkpoint that was last finished, in a few words."""
        last = [session.last for session in self._sessions.values()]
        return "; ".join(status_of(report) for report in last if report is not None)

    @property
    def awaits_trial(self) -> bool:
        """Whether the module was not tried yet, and could be."""
        return any(session.awaits_trial for session in self._sessions.values())

    @property
    def needs_final_weights(self) -> bool:
        """Whether the weights at the end become a model where there is no best checkpoint."""
        return (
            self.is_active
            and self._settings.cadence.at_end
            # What is unfinished may be a trial, or have no checkpoint any more.
            and not any(session.reports for session in self._sessions.values())
        )

    def say(self, text: str) -> None:
        """Tell the user a line, if lines are wanted."""
        if self._settings.console:
            self._say(text)

    # --- batches ----------------------------------------------------------------------------

    def begin_batch(
        self,
        batch: Any,
        rehearse: Callable[[Any], Callable[[Any, Any], Any] | None] = lambda _: None,
    ) -> None:
        """A batch was moved to its device and a step begins, of training or validation.

        Args:
            batch: The batch.
            rehearse: Gives for a target what runs the step on a copy of the module, see
                :meth:`ExportSession.begin_batch`, or ``None``.
        """
        for name, session in self._sessions.items():
            session.begin_batch(batch, rehearse(self._settings.targets[name]))

    def count_batch(self) -> None:
        """A batch of training begins; to be told before anything else of it, in all processes."""
        self.batches += 1

    def step(self, weights: Callable[[], Weights], batch: Any = ()) -> None:
        """A step of training begins, where a framework says no more than that.

        Args:
            weights: Gives the weights as they are.
            batch: The batch, if it is known; else only calls of the module itself are watched.
        """
        self.count_batch()
        if self._settings.preflight is None:
            self.try_early(None)
        else:
            self.try_early(weights)
        self.begin_batch(batch)

    def begin_epoch(self, epoch: int) -> None:
        """An epoch of training begins, the first of them with the number 0."""
        if epoch > 0 and self.batches >= WATCHED:
            for session in self._sessions.values():
                session.stop_observing()

    def try_early(self, weights: Callable[[], Weights | None] | None) -> None:
        """Export once, when two batches were trained on: it is better to know now.

        What earlier runs owe is made then, too.

        Args:
            weights: Gives the weights as they are; ``None``: they could not be had. Itself
                ``None``: the module is not tried.
        """
        training = self._training
        if training is None or self.batches <= OBSERVED_FIRST or not training.leaves_files:
            return
        with never_raises("the export before the first checkpoint"):
            self._recover(training)
            waiting = {n: each for n, each in self._sessions.items() if each.awaits_trial}
            given = weights() if waiting and weights is not None else None
            if given is None:
                return
            origin = replace(given.origin, checkpoint=None, metrics={})
            module = given.whole()
            for name, session in waiting.items():
                path = self._folder / f"preflight{name}.onnx"
                saved = Saved(state=given.state, path=path, origin=origin, module=module)
                session.try_early(saved, self._no_export)

    def _recover(self, training: Training) -> None:
        here = [Path(root) for root in training.roots if not is_remote(root)]
        folders = [*here, *([self._settings.dirpath] if self._settings.dirpath else [])]
        for name, session in self._sessions.items():
            session.recover(folders, partial(self.model_path, name=name), training.is_ours)
        if self.batches == OBSERVED_FIRST + 1:
            self._announced.adopt(folders)

    def _no_export(self, report: ExportReport) -> None:
        what = f"The module does not export [{report.code}]"
        message = f"{what}, so no checkpoint will get a model: {report.error}"
        if self._settings.preflight == "warn":
            end = "" if message.endswith((".", "!", "?")) else "."
            logger.warning("%s%s Training goes on.", message, end)
        else:
            self._early_failure = ExportError(message, report)

    # --- checkpoints ------------------------------------------------------------------------

    def saving(self, checkpoint: str) -> None:
        """A checkpoint is about to be saved under this path."""
        with never_raises(f"the save of {checkpoint}"):
            for name, session in self._sessions.items():
                session.saving(self.model_path(checkpoint, name), checkpoint)

    def wants(self, checkpoint: str, decide: Callable[[], bool]) -> bool:
        """Tell whether a checkpoint that was saved becomes a model.

        Args:
            checkpoint: Its path.
            decide: Decides; a user's, which may raise.
        """
        if not self._sessions:
            return False
        wanted = True
        with never_raises(f"should_export of {checkpoint}; it is exported"):
            wanted = decide()
        self.saves += 1
        if not wanted:
            self.pass_over(checkpoint)
        return wanted

    def pass_over(self, checkpoint: str) -> None:
        """A checkpoint was saved and gets no model."""
        with never_raises(f"passing {checkpoint} over"):
            for name, session in self._sessions.items():
                session.pass_over(self.model_path(checkpoint, name))

    def saved(
        self,
        checkpoint: str,
        weights: Callable[[], Weights],
        only: Iterable[str] | None = None,
        *,
        handed_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """A checkpoint was saved that is wanted; training may have ended before.

        Args:
            checkpoint: Its path.
            weights: Gives what is in it; may raise.
            only: If given, for these targets.
            handed_over: Tells whether its folder is given away now: the models are waited for.
        """
        with never_raises(f"exporting {checkpoint}"):
            self._save(checkpoint, weights(), only)
            if self._settings.background is not None and handed_over():
                self._hand_over(checkpoint)
            if self._ended and self._settings.background is not None:
                # Nobody will wait for it later.
                background = self._settings.background
                limit_s = DRAIN_AFTER_ERROR_S if self._failed else background.drain_s
                end = time.monotonic() + limit_s
                self.drain(limit_s)
                self._announced.finish(end - time.monotonic(), failed=self._failed)

    def _save(self, checkpoint: str, weights: Weights, only: Iterable[str] | None = None) -> None:
        self._linked = -1
        names = list(self._sessions if only is None else only)
        try:
            whole = weights.whole()
        except Exception as error:  # attributes of the user's modules are copied
            logger.debug("What is spread over processes could not be copied", exc_info=True)
            self._refuse(str(error), weights.origin, names)
            return
        validation = weights.validation()
        for name in names:
            self._sessions[name].saved(
                Saved(
                    state=weights.state,
                    path=self.model_path(checkpoint, name),
                    origin=weights.origin,
                    file=weights.file,
                    module=whole,
                    validation=validation,
                )
            )

    def refused(self, reason: str, origin: Provenance) -> None:
        """A checkpoint was saved and its weights cannot be had."""
        with never_raises(f"refusing {origin.checkpoint}"):
            self._refuse(reason, origin, self._sessions)

    def _refuse(self, reason: str, origin: Provenance, names: Iterable[str]) -> None:
        for name in names:
            self._sessions[name].failed(reason, origin)

    def lacking(self, checkpoint: str, state: Mapping[str, Any]) -> list[str]:
        """Return the targets for which these very weights have not become a model."""
        weights = weights_sha256(state)
        return [name for name in self._sessions if not self._holds(checkpoint, name, weights)]

    def _holds(self, checkpoint: str, name: str, weights: str) -> bool:
        model = str(self.model_path(checkpoint, name))
        return any(
            report.ok and report.path == model and report.weights_sha256 == weights
            for report in self._sessions[name].reports
        )

    def _hand_over(self, checkpoint: str) -> None:
        end = time.monotonic() + HAND_OVER_S
        while any(session.unfinished for session in self._sessions.values()):
            if time.monotonic() > end:
                logger.warning("%s is handed over without a model. Training goes on.", checkpoint)
                return
            time.sleep(PAUSE_S)

    def removing(self, checkpoint: str) -> None:
        """A checkpoint is about to be removed."""
        with never_raises(f"the removal of {checkpoint}"):
            for name, session in self._sessions.items():
                session.removing(self.model_path(checkpoint, name), checkpoint)

    def removed(self, checkpoint: str) -> None:
        """A checkpoint was removed."""
        for name, session in self._sessions.items():
            with never_raises(f"the removal of {checkpoint}"):
                model = self.model_path(checkpoint, name)
                if not remove_link(model):
                    session.removed(model, checkpoint)

    def linked(self, links: Iterable[tuple[str, str]]) -> None:
        """Somebody links to checkpoints after they were saved, and models may come later.

        Args:
            links: Each link, and the checkpoint that it leads to; looked at when there are new
                models.
        """
        finished = sum(len(session.reports) for session in self._sessions.values())
        if self._linked == finished:
            return
        self._linked = finished
        with never_raises("linking models"):
            for link, checkpoint in links:
                for name in self._sessions:
                    self._link(self.model_path(checkpoint, name), self.model_path(link, name))

    def _link(self, model: Path, link: Path) -> None:
        try:
            follow_link(model, link)
        except (OSError, PublishError) as error:
            logger.warning("%s has no model: %s", link, error)

    def model_path(self, checkpoint: str, name: str = "") -> Path:
        """Return where the model of a checkpoint lies, or will.

        Args:
            checkpoint: Its path.
            name: Of a target.
        """
        place = "" if self._training is None else self._training.place or ""
        return self._paths.of(checkpoint, f"{name}{place}")

    # --- the end ----------------------------------------------------------------------------

    def finish(
        self,
        best: str | None = None,
        *,
        stored: Callable[[], Weights] | None = None,
        final: tuple[str, Callable[[], Weights]] | None = None,
        links: Callable[[], Iterable[tuple[str, str]]] = tuple,
    ) -> None:
        """Training is over: wait for the models, and see to it that the best weights have one.

        Args:
            best: The best checkpoint, if there is one.
            stored: Gives what is in it.
            final: If no checkpoint became a model: a path that would be the checkpoint's, and what
                gives the weights as they are.
            links: See :meth:`linked`.
        """
        background = self._settings.background
        end = time.monotonic() + (0.0 if background is None else background.drain_s)
        if self._sessions:
            with never_raises("the export at the end of training"):
                self.drain(end - time.monotonic())
                self._export_at_end(best, stored, final)
                self.drain(end - time.monotonic())
            self.linked(links())
        self._ended = True
        for name, session in self._sessions.items():
            with never_raises("the end of training"):
                session.finish(None if best is None else self.model_path(best, name))
        self._end(end - time.monotonic())

    def fail(self, links: Callable[[], Iterable[tuple[str, str]]] = tuple) -> None:
        """Training is over by an error, or by Ctrl-C: wait a little."""
        self._ended = self._failed = True
        end = time.monotonic() + DRAIN_AFTER_ERROR_S
        with never_raises("the end of training by an error"):
            self.drain(DRAIN_AFTER_ERROR_S)
        if self._sessions:
            self.linked(links())
        for session in self._sessions.values():
            with never_raises("the end of training by an error"):
                session.finish()
        self._end(end - time.monotonic())

    def _export_at_end(
        self,
        best: str | None,
        stored: Callable[[], Weights] | None,
        final: tuple[str, Callable[[], Weights]] | None,
    ) -> None:
        """Make sure that the best weights have a model."""
        if not self._settings.cadence.at_end or self._training is None:
            return
        if not self._training.leaves_files:
            if final is not None:
                self._dry_run(final[1]())
        elif best is None:
            if final is not None and self.needs_final_weights:
                self._save(final[0], final[1]())
        elif stored is not None:
            lacking = [name for name in self._sessions if self._lacks_model(best, name)]
            if lacking:
                self._save_stored(best, stored, lacking)

    def _save_stored(
        self, checkpoint: str, stored: Callable[[], Weights], names: Iterable[str]
    ) -> None:
        try:
            weights = stored()
        except Exception as error:  # a file that is gone, or damaged
            logger.debug("%s cannot be read", checkpoint, exc_info=True)
            reason = f"The weights of {checkpoint} cannot be had: {error}"
            self._refuse(reason, Provenance(checkpoint=checkpoint), names)
        else:
            self._save(checkpoint, weights, names)

    def _lacks_model(self, checkpoint: str, name: str) -> bool:
        """Tell whether a checkpoint has no model, and was not tried in vain."""
        path = self.model_path(checkpoint, name)
        reports = self._sessions[name].reports
        place = self._remote.url(path) or str(path)
        proven = any(report.ok and report.path == place for report in reports)
        failed = any(not report.ok and report.checkpoint == checkpoint for report in reports)
        return not failed and not (proven and path.exists())

    def _dry_run(self, weights: Weights) -> None:
        """Prove that the module exports, and keep nothing."""
        background = self._settings.background
        for session in self._sessions.values():
            with tempfile.TemporaryDirectory(prefix="onnxport-") as folder:
                path = Path(folder) / "model.onnx"
                origin = replace(weights.origin, checkpoint=None)
                whole = weights.whole()
                session.dry_run(Saved(state=weights.state, path=path, origin=origin, module=whole))
                session.drain(0.0 if background is None else background.drain_s)

    def drain(self, limit_s: float) -> None:
        """Wait for models that are not finished, so long at most, in seconds."""
        in_rich = self._training is not None and self._training.in_rich and self._settings.console
        drain(self._sessions, limit_s, self.say, in_rich=in_rich)

    def _end(self, limit_s: float) -> None:
        """All models are there that will be."""
        self._announced.finish(limit_s, failed=self._failed)
        with never_raises("showing what was made"):
            if self._settings.console and self._sessions:
                dropped = sum(session.dropped for session in self._sessions.values())
                show(self.reports, self.say, dropped)

    def take_failure(self) -> ExportError | None:
        """Return the first failure that should end training and was not taken yet."""
        early, self._early_failure = self._early_failure, None
        failures = [early]
        if self._settings.on_error == "raise":
            failures += [session.take_failure() for session in self._sessions.values()]
        return next((one for one in failures if one is not None), None)


def _has_place(training: Training | None) -> bool:
    """Tell whether the models of a training have names of their own."""
    return training is not None and training.place is not None
