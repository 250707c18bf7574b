"""The callback: translates Lightning's hooks and holds no line about ONNX."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from platformdirs import user_cache_path
from typing_extensions import override

from onnxport.callbacks.cadence import When, read_when
from onnxport.callbacks.checkpoint_io import MirroredCheckpointIO
from onnxport.callbacks.lightning.drain import drain
from onnxport.callbacks.lightning.facts import (
    best_checkpoint,
    checkpoint_roots,
    file_of,
    is_handed_over,
    is_redirected,
    origin_of,
    run_address,
    run_folder,
    with_best_score,
)
from onnxport.callbacks.lightning.links import mirror_links, remove_link
from onnxport.callbacks.lightning.measured import Measured
from onnxport.callbacks.lightning.names import (
    FrameworkAware,
    framework_of,
    teller,
    unbound,
    unpickled,
)
from onnxport.callbacks.lightning.place import has_the_place, is_sharded, place_among
from onnxport.callbacks.lightning.progress import add_status, remove_status
from onnxport.callbacks.lightning.rehearsal import rehearsal
from onnxport.callbacks.lightning.sharded import (
    gather_saves,
    live_state,
    load_checkpoint,
    stand_in,
)
from onnxport.callbacks.lightning.validation import ValidationWatch
from onnxport.callbacks.options import (
    DRAIN_AFTER_ERROR_S,
    AnyTarget,
    read_background,
    read_mlflow,
    read_preflight,
    read_targets,
)
from onnxport.callbacks.page import RunPage, pages_are_wanted
from onnxport.callbacks.paths import ModelPaths
from onnxport.callbacks.remote import RemoteModels, is_remote, short_name
from onnxport.callbacks.runner import InlineRunner, WorkerRunner
from onnxport.callbacks.session import ExportSession, Saved
from onnxport.callbacks.summary import show, status_of
from onnxport.callbacks.sync import keep_record
from onnxport.callbacks.turns import Turns
from onnxport.config import (
    Background,
    ExportOptions,
    Inputs,
    Metrics,
    MLflow,
    Verify,
    require_choice,
)
from onnxport.errors import ConfigurationError, ExportError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.unsharded import gathered
from onnxport.exporter.weights import weights_sha256
from onnxport.report import ExportReport
from onnxport.tracking.base import place_of
from onnxport.tracking.job import Job, jobs_in, model_of
from onnxport.tracking.outbox import InlineOutbox, ProcessOutbox, Unavailable
from onnxport.validation.session import require_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from onnxport.callbacks.runner import Runner
    from onnxport.config import CoreName, Precision
    from onnxport.report import Provenance
    from onnxport.tracking.base import RunAddress
    from onnxport.tracking.outbox import Outbox

__all__ = ["OnnxExport"]

logger = logging.getLogger(__name__)

_TUNER_PREFIXES = (".lr_find", ".scale_batch_size")
"""Checkpoints that the tuner writes for itself and removes again."""

OBSERVED_FIRST = 2
"""Batches that are seen before the export is tried."""

WATCHED = 200
"""Batches after which calls are watched no more than to the end of the epoch: a small data set may
show its other sizes in a later epoch only."""

HAND_OVER_S = 300.0
"""How long a checkpoint that is handed over waits for its model: other processes wait meanwhile,
and are ended after ten minutes by default (NCCL)."""

PAGE_S = 30.0
"""How long the end of training waits for the page of the run."""

PAUSE_S = 0.02
"""How often it looks."""

_SAME_NAMES = (
    "Two OnnxExport callbacks of one trainer would write the same files, so only the first of them "
    "works. Give them another dirpath= or another target=."
)


class OnnxExport(metaclass=FrameworkAware):
    """Turns every checkpoint into a proven ONNX model.

    Next to each checkpoint that the trainer writes appears ``<stem>.onnx`` with that checkpoint's
    weights, run in ONNX Runtime at several batch sizes and compared with PyTorch; it is removed
    with its checkpoint. Training is not changed: losses, weights, optimizer state, random numbers
    and the mode of every submodule stay as they would be without the callback.

    Args:
        dirpath: Folder for the models; default: beside each checkpoint.
        when: ``"checkpoint"``: every checkpoint written, and the end; ``"end"``: only the best one,
            when training ends; or a :class:`~onnxport.Cadence`.
        core: ``"auto"`` (dynamo, then trace, then script), ``"dynamo"``, ``"trace"``, ``"script"``
            or ``"torchscript"`` (trace, then script).
        target: What to export; default: the module's ``forward``, or, when that is never called,
            the outermost submodule that is called with the batch. Else the dotted name of a
            submodule or method (``"predict_step"``); or a callable that gets a copy of the module
            and returns a module or function around it, for pre- and post-processing; or a mapping
            of names to these, for several models per checkpoint, ``<stem>-<name>.onnx``.
        inputs: Overrides of what is observed and inferred.
        opset: ONNX opset version; default: torch's own.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"fp64"``; default: the checkpoint's own,
            as far as ONNX Runtime can run it.
        verify: ``True``, or :class:`~onnxport.Verify` with tolerance, providers and sizes.
        validate_metrics: Run the module's own ``validation_step`` with each model in the place of
            the module, on the batches of the first validation run, and compare what it logs. A
            model whose metrics are worse than :class:`~onnxport.Metrics` allows never gets the
            alias. ``True``: on all batches; a number: on so many of each loader.
        variants: Smaller children of each model, ``<stem>.<name>.onnx``: ``"fp16"``, ``"int8"``
            (weights as whole numbers, activations as they come), ``"int8-static"`` (both, after
            calls that were seen). Each is proven, with a wider budget: a part of the largest value
            of each output, 0.01 for ``"fp16"`` and 0.15 for the others; a mapping of names to
            numbers says another. What fails is not there, and the report says why.
        latency: Measure how long runs take, of the model on each provider and of the module, when
            a graph is new, for ``True``: 3 s in all, or so many seconds. In the background that is
            beside training and on few threads: compare the numbers with each other.
        mlflow: ``"auto"``: the run of the trainer's ``MLFlowLogger``, if there is one; ``True``: as
            ``"auto"``, but with a run of our own when there is none, at ``MLFLOW_TRACKING_URI`` or
            on sqlite under the trainer's root; ``False``; or :class:`~onnxport.MLflow`.
        register: Name in the model registry; short for ``MLflow(register=...)``.
        background: ``True``: models are made in a worker process, and training goes on meanwhile;
            :class:`~onnxport.Background` says how that process lives; ``False``: at once, in the
            training process, which waits. ``ONNXPORT_BACKGROUND=0`` in the environment makes
            ``True`` mean ``False``.
        preflight: Export once as soon as calls were seen, so that a module that does not export is
            known in the first minute. ``True``: warn; ``"raise"``: end training then; ``None``:
            warn, if models are made in the background.
        on_error: ``"warn"``: log, report, keep training; ``"raise"``: raise
            :class:`~onnxport.ExportError` at the next safe point of the loop.
        console: Say a line per model, show the last one in the progress bar, and a table when
            training is over; ``False``: only warnings.
        page: Draw a page of the run, ``onnxport.html`` beside the folder of checkpoints, now and
            then and at the end, in a process of its own, and show it in the MLflow run. It needs
            ``onnxport[page]``; without that only its history is written, for ``onnxport report``.
            ``False``: neither; ``ONNXPORT_PAGE=0`` in the environment makes that the default.

    Attributes:
        reports: One :class:`~onnxport.ExportReport` per attempted checkpoint, complete when ``fit``
            returns.
        preflight_reports: What came of the export before the first checkpoint, one per target.

    Raises:
        ConfigurationError: If an argument is wrong.
        MissingDependencyError: If ONNX Runtime, Lightning or (where asked for) MLflow is missing.

    Example:
        >>> from onnxport import OnnxExport
        >>> callback = OnnxExport(when="end")
        >>> callback.reports
        []
    """

    def __init__(  # noqa: PLR0913 - flat keyword arguments, as Lightning's own callbacks
        self,
        *,
        dirpath: str | os.PathLike[str] | None = None,
        when: When = "checkpoint",
        core: CoreName = "auto",
        target: AnyTarget = None,
        inputs: Inputs | None = None,
        opset: int | None = None,
        precision: Precision | None = None,
        verify: bool | Verify = True,
        validate_metrics: bool | int | Metrics = False,
        variants: Iterable[str] | Mapping[str, float] = (),
        latency: bool | float = False,
        mlflow: Literal["auto"] | bool | MLflow = "auto",
        register: str | None = None,
        background: bool | Background = True,
        preflight: bool | Literal["raise"] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        console: bool = True,
        page: bool | None = None,
    ) -> None:
        require_choice("on_error", on_error, ("warn", "raise"))
        if not isinstance(dirpath, (str, os.PathLike, type(None))):
            raise ConfigurationError(f"dirpath= must be a folder, got {dirpath!r}.")
        if dirpath is not None and is_remote(dirpath):
            raise ConfigurationError(
                f"dirpath= must be a folder of this machine, got {str(dirpath)!r}. Without it, "
                "models lie beside their checkpoints, on remote file systems too."
            )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.cadence = read_when(when)
        self.targets = read_targets(target)
        self.background = read_background(background)
        require_runtime(here=self.background is None)
        self.preflight = read_preflight(preflight, self.background)
        self.on_error = on_error
        self.console = console
        self.page = pages_are_wanted(page)
        self.options = ExportOptions.of(
            core=core,
            inputs=inputs,
            opset=opset,
            precision=precision,
            verify=verify,
            validate_metrics=validate_metrics,
            variants=variants,
            latency=latency,
        )
        self._mlflow = read_mlflow(mlflow, register)
        self._sessions: dict[str, ExportSession] = {}
        self._earlier: list[ExportReport] = []
        self._saves = 0
        self._place: str | None = ""
        self._root, self._folder = "", Path()
        self._remote = RemoteModels(self._folder)
        self._paths = ModelPaths(self.dirpath)
        self._interrupted: list[str] = []
        self._on_its_way = ""
        self._linked = 0
        self._batches = 0
        self._ended = self._failed = False
        self._early_failure: ExportError | None = None
        self._outbox: Outbox | None = None
        self._run: RunAddress | None = None
        self._measured = Measured()
        self._watch: ValidationWatch | None = None
        self._page: RunPage | None = None
        self._roots: list[str] = []

    @property
    def reports(self) -> list[ExportReport]:
        """One report per attempted checkpoint, in order."""
        now = [session.reports for session in self._sessions.values()]
        return [*self._earlier, *(r for group in zip_longest(*now) for r in group if r is not None)]

    @property
    def preflight_reports(self) -> list[ExportReport]:
        """What came of the export before the first checkpoint, one per target."""
        tried = [session.preflight for session in self._sessions.values()]
        return [report for report in tried if report is not None]

    def should_export(self, trainer: Any, checkpoint: str) -> bool:
        """Decide whether a checkpoint that was just written becomes a model.

        Override this to decide in another way than by ``when``.

        Args:
            trainer: The trainer.
            checkpoint: Path of the checkpoint.
        """
        return self.cadence.should_export(self._saves)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        state = vars(self) | {"_sessions": {}, "_earlier": self.reports, "_watch": None}
        state["_page"] = None
        return unpickled, (unbound(type(self)), state)

    # --- hooks ------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._place = place_among(
            self, trainer.callbacks, lambda other: isinstance(other, OnnxExport)
        )
        if self._place is None and self.on_error == "raise":
            raise ConfigurationError(_SAME_NAMES)
        if self._place is None:
            return
        if is_sharded(trainer.strategy):
            gather_saves(
                trainer.strategy,
                id(self),
                lambda path: self._wants(trainer, path),
                lambda content, path: self._on_wanted(trainer, content, path),
                lambda reason, path: self._on_refused(trainer, reason, path),
                self._on_saving,
            )
        if not trainer.is_global_zero:
            return
        checkpoint_io = trainer.strategy.checkpoint_io
        if not isinstance(checkpoint_io, MirroredCheckpointIO):
            checkpoint_io = MirroredCheckpointIO(checkpoint_io)
            trainer.strategy.checkpoint_io = checkpoint_io
        checkpoint_io.listen(
            id(self),
            lambda content, path: self._on_saved(trainer, content, path),
            self._on_removed,
            on_interrupted=self._interrupted.append,
            on_saving=self._on_saving,
            on_removing=self._on_removing,
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._measured, self._roots = Measured(), checkpoint_roots(trainer)
        root = str(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        self._root, self._folder = root, _folder_here(root)
        self._remote = RemoteModels(self._folder / "onnxport-remote")
        self._paths = ModelPaths(self.dirpath, self._roots, self._remote)
        self._earlier, self._saves, self._sessions = self.reports, 0, {}
        self._batches, self._linked, self._early_failure = 0, 0, None
        self._ended = self._failed = False
        if not trainer.is_global_zero:
            return
        if self._place is None:
            logger.warning("%s Training goes on.", _SAME_NAMES)
            self._earlier.append(ExportReport(ok=False, error=_SAME_NAMES))
            return
        address = self._address(trainer)
        turns = Turns()
        self._page = self._new_page(trainer)
        self._sessions = {
            name: ExportSession(
                pl_module,
                self.options,
                target=target,
                outbox=self._outbox,
                address=None if address is None else address.named(name),
                is_redirected=is_redirected,
                fallback=lambda: getattr(pl_module, "example_input_array", None),
                say=self._say,
                runner=self._runner(pl_module, place),
                name=name,
                turns=turns,
                remote=self._remote,
                page=self._page,
            )
            for place, (name, target) in enumerate(self.targets.items())
        }
        if self.options.metrics is not None:
            framework = framework_of(type(self)) or ""
            self._watch = ValidationWatch(self.options.metrics, framework)
        if self.console:
            with _never_raises("showing the last model"):
                add_status(trainer, self._status)

    def _new_page(self, trainer: Any) -> RunPage | None:
        """Return the page of this fit; that of an earlier fit in its folder begins anew."""
        if not self.page or trainer.fast_dev_run:
            return None
        folder = run_folder(trainer, self._folder)
        return RunPage(folder, anew=trainer.ckpt_path is None, ready=self._attach)

    def _attach(self, page: Path) -> None:
        """Show the page in the run of a tracking server."""
        address, outbox = self._run, self._outbox
        if address is not None and outbox is not None:
            job = Job(model=page.absolute(), place=place_of(page), address=address, attached=True)
            outbox.submit(job, lambda _: None)

    def _runner(self, pl_module: Any, place: int) -> Runner:
        if self.background is None:
            return InlineRunner()
        return WorkerRunner(self.background, pl_module, place)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        early = self._early_weights(trainer, pl_module)
        if self._sessions:
            self._mirror_links(trainer)
            with _never_raises("the export before the first checkpoint"):
                self._try_early(trainer, early)
            self._begin_batch(trainer, "training_step", batch, batch_idx)
        if trainer.world_size == 1:
            self._raise_failure(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._measured.begin(trainer.callback_metrics)
            if self._watch is not None:
                with _never_raises("keeping batches of the validation"):
                    self._watch.begin(len(trainer.num_val_batches))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._measured.end(trainer.callback_metrics, trainer.global_step)
            if self._watch is not None:
                self._watch.end()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._begin_batch(trainer, "validation_step", batch, batch_idx, dataloader_idx)
        if self._watch is not None and not trainer.sanity_checking:
            with _never_raises("keeping a batch of the validation"):
                self._watch.batch(batch, dataloader_idx)

    def _begin_batch(self, trainer: Any, step: str, batch: Any, *indices: int) -> None:
        alone = not is_sharded(trainer.strategy)  # a copy of a part cannot run a step
        for name, session in self._sessions.items():
            method = self.targets[name]
            run = rehearsal(step, trainer, *indices, method=method) if alone else None
            session.begin_batch(batch, run)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._raise_failure(trainer)
        if trainer.current_epoch > 0 and self._batches >= WATCHED:
            for session in self._sessions.values():
                session.stop_observing()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        end = time.monotonic() + (0.0 if self.background is None else self.background.drain_s)
        final = self._final_weights(trainer, pl_module)
        if self._sessions:
            with _never_raises("the export at the end of training"):
                self._drain(trainer, end - time.monotonic())
                self._export_at_end(trainer, final)
                self._drain(trainer, end - time.monotonic())
            self._mirror_links(trainer)
        self._ended = True
        best = best_checkpoint(trainer)
        for name, session in self._sessions.items():
            with _never_raises("the end of training"):
                session.finish(None if best is None else self._model_path(best, name))
        self._finish(trainer, end - time.monotonic())
        self._raise_failure(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        interrupted = dict.fromkeys(self._interrupted if self._sessions else ())
        self._interrupted.clear()
        for path in interrupted:
            self._begin_again(trainer, path)
        self._on_its_way = ""
        self._ended = self._failed = True
        with _never_raises("showing the last model"):
            remove_status(trainer)
        end = time.monotonic() + DRAIN_AFTER_ERROR_S
        with _never_raises("the end of training by an error"):
            self._drain(trainer, DRAIN_AFTER_ERROR_S)
        if self._sessions:
            self._mirror_links(trainer)
        for session in self._sessions.values():
            with _never_raises("the end of training by an error"):
                session.finish()
        self._finish(trainer, end - time.monotonic())

    def _finish(self, trainer: Any, limit_s: float) -> None:
        """All models are there that will be."""
        self._finish_tracking(limit_s)
        with _never_raises("showing what was made"):
            self._show(trainer)

    def _say(self, text: str) -> None:
        if self.console:
            teller(type(self))(text)

    def _status(self) -> str:
        """Return what became of the checkpoint that was last finished."""
        last = [session.last for session in self._sessions.values()]
        return "; ".join(status_of(report) for report in last if report is not None)

    def _show(self, trainer: Any) -> None:
        """Show what became of all checkpoints of this fit."""
        remove_status(trainer)
        if self.console and self._sessions:
            now = [session.reports for session in self._sessions.values()]
            show([r for group in zip_longest(*now) for r in group if r is not None], self._say)

    def _drain(self, trainer: Any, limit_s: float) -> None:
        drain(self._sessions, limit_s, trainer if self.console else None, self._say)

    def _early_weights(
        self, trainer: Any, pl_module: Any
    ) -> Callable[[], Mapping[str, Any]] | None:
        """Return what gives the weights for a trial; ``None``: now is not the time for one."""
        if self._place is None or self.preflight is None or trainer.fast_dev_run:
            return None
        if not is_sharded(trainer.strategy):
            return pl_module.state_dict  # type: ignore[no-any-return]
        if self._batches != OBSERVED_FIRST + 1:
            return None
        needed = False
        with _never_raises("the export before the first checkpoint"):
            needed = any(session.awaits_trial for session in self._sessions.values())
        return self._gathered(trainer, needed)

    def _gathered(self, trainer: Any, needed: bool) -> Callable[[], Mapping[str, Any]]:
        """Put whole weights together on rank zero; all processes do, or none does."""
        whole: dict[str, Any] = {}
        if trainer.strategy.broadcast(needed):
            with _never_raises("gathering the weights"):
                whole = gathered(live_state(trainer.strategy), keep=needed)
        return lambda: whole

    def _try_early(self, trainer: Any, weights: Callable[[], Mapping[str, Any]] | None) -> None:
        """Export once two batches were trained on: it is better to know now."""
        if self._batches <= OBSERVED_FIRST or trainer.fast_dev_run:
            return
        here = [Path(root) for root in self._roots if not is_remote(root)]
        folders = [*here, *([self.dirpath] if self.dirpath else [])]
        peers = [other for other in trainer.callbacks if isinstance(other, OnnxExport)]
        is_ours = partial(has_the_place, self, peers, here)
        for name, session in self._sessions.items():
            session.recover(folders, partial(self._model_path, name=name), is_ours)
        if self._batches == OBSERVED_FIRST + 1 and self._outbox is not None:
            for job in jobs_in(folders):  # what an earlier run could not tell its server
                self._outbox.adopt(job, partial(keep_record, model_of(job)))
        waiting = [(n, session) for n, session in self._sessions.items() if session.awaits_trial]
        if not waiting or weights is None:
            return
        state = weights()
        if not state:  # they could not be gathered
            return
        module = stand_in(trainer, state)
        origin = replace(origin_of(trainer, "", self._measured), checkpoint=None, metrics={})
        for name, session in waiting:
            path = self._folder / f"preflight{name}.onnx"
            saved = Saved(state=state, path=path, origin=origin, module=module)
            session.try_early(saved, self._no_export)

    def _no_export(self, report: ExportReport) -> None:
        what = f"The module does not export [{report.code}]"
        message = f"{what}, so no checkpoint will get a model: {report.error}"
        if self.preflight == "warn":
            logger.warning("%s Training goes on.", message)
        else:
            self._early_failure = ExportError(message, report)

    # --- checkpoints ------------------------------------------------------------------------

    def _on_saving(self, path: str) -> None:
        with _never_raises(f"the save of {path}"):
            for name, session in self._sessions.items():
                if not _is_of_tuner(path):
                    session.saving(self._model_path(path, name), path)

    def _on_removing(self, path: str) -> None:
        with _never_raises(f"the removal of {path}"):
            for name, session in self._sessions.items():
                session.removing(self._model_path(path, name), path)

    def _on_saved(self, trainer: Any, content: dict[str, Any], path: str) -> None:
        # Without it, weights are on their way home from a process of ddp_spawn.
        if "state_dict" in content and self._wants(trainer, path):
            self._on_its_way = path
            self._on_wanted(trainer, content, path)
            self._on_its_way = ""
        elif "state_dict" not in content:
            self._pass_over(path)

    def _pass_over(self, path: str) -> None:
        """A checkpoint was saved and gets no model."""
        with _never_raises(f"passing {path} over"):
            for name, session in self._sessions.items():
                session.pass_over(self._model_path(path, name))

    def _on_wanted(
        self,
        trainer: Any,
        content: dict[str, Any],
        path: str,
        only: Iterable[str] | None = None,
    ) -> None:
        with _never_raises(f"exporting {path}"):
            origin = origin_of(trainer, path, self._measured)
            state, file = content["state_dict"], file_of(trainer, path)
            self._save(trainer, state, path, origin, only, file)
            if self.background is not None and is_handed_over(trainer, path):
                self._hand_over(path)
            if self._ended and self.background is not None:  # nobody will wait for it later
                limit_s = DRAIN_AFTER_ERROR_S if self._failed else self.background.drain_s
                end = time.monotonic() + limit_s
                self._drain(trainer, limit_s)
                self._finish_tracking(end - time.monotonic())

    def _begin_again(self, trainer: Any, path: str) -> None:
        """Make the models of a checkpoint whose save was broken off, if it is there after all."""
        with _never_raises(f"exporting {path}"):
            file = file_of(trainer, path)
            decided = path == self._on_its_way  # for each checkpoint once: some wants every third
            if file is None or not (decided or self._wants(trainer, path)):
                return
            state = read_state_dict(file)
            weights = weights_sha256(state)
            lacking = [name for name in self._sessions if not self._holds(path, name, weights)]
            if lacking:
                self._on_wanted(trainer, {"state_dict": state}, path, lacking)

    def _holds(self, checkpoint: str, name: str, weights: str) -> bool:
        """Tell whether these very weights of a checkpoint have become a model."""
        model = str(self._model_path(checkpoint, name))
        return any(
            report.ok and report.path == model and report.weights_sha256 == weights
            for report in self._sessions[name].reports
        )

    def _hand_over(self, path: str) -> None:
        """Wait for the models of a checkpoint whose folder is given away."""
        end = time.monotonic() + HAND_OVER_S
        while any(session.unfinished for session in self._sessions.values()):
            if time.monotonic() > end:
                logger.warning("%s is handed over without a model. Training goes on.", path)
                return
            time.sleep(PAUSE_S)

    def _on_refused(self, trainer: Any, reason: str, path: str) -> None:
        with _never_raises(f"refusing {path}"):
            self._refuse(reason, origin_of(trainer, path, self._measured), self._sessions)

    def _refuse(self, reason: str, origin: Provenance, names: Iterable[str]) -> None:
        for name in names:
            self._sessions[name].failed(reason, origin)

    def _wants(self, trainer: Any, path: str) -> bool:
        if not self._sessions or _is_of_tuner(path):
            return False
        wanted = True
        with _never_raises(f"should_export of {path}; it is exported"):
            wanted = self.should_export(trainer, path)
        self._saves += 1
        if not wanted:
            self._pass_over(path)
        return wanted

    def _on_removed(self, path: str) -> None:
        for name, session in self._sessions.items():
            with _never_raises(f"the removal of {path}"):
                model = self._model_path(path, name)
                if not remove_link(model):
                    session.removed(model, path)

    def _save(
        self,
        trainer: Any,
        state: Any,
        checkpoint: str,
        origin: Provenance,
        only: Iterable[str] | None = None,
        file: Path | None = None,
    ) -> None:
        self._linked = -1
        names = list(self._sessions if only is None else only)
        try:
            whole = stand_in(trainer, state)
        except Exception as error:  # attributes of the user's modules are copied
            logger.debug("What is spread over processes could not be copied", exc_info=True)
            self._refuse(str(error), origin, names)
            return
        validation = None if self._watch is None else self._watch.next()
        for name in names:
            path = self._model_path(checkpoint, name)
            self._sessions[name].saved(
                Saved(
                    state=state,
                    path=path,
                    origin=origin,
                    file=file,
                    module=whole,
                    validation=validation,
                )
            )

    def _model_path(self, checkpoint: str, name: str) -> Path:
        return self._paths.of(checkpoint, f"{name}{self._place or ''}")

    def _mirror_links(self, trainer: Any) -> None:
        """The trainer links to a checkpoint after it has saved it, and its model may come later."""
        finished = sum(len(session.reports) for session in self._sessions.values())
        if self._linked != finished:
            self._linked = finished
            for name in self._sessions:
                with _never_raises("linking models"):
                    mirror_links(trainer, partial(self._model_path, name=name))

    def _final_weights(self, trainer: Any, pl_module: Any) -> Callable[[], Mapping[str, Any]]:
        """Return what gives the weights as they are at the end, whole on rank zero."""
        if not is_sharded(trainer.strategy):
            return lambda: dict(pl_module.state_dict())
        needed = (
            bool(self._sessions)
            and self.cadence.at_end
            and best_checkpoint(trainer) is None
            # What is unfinished may be a trial, or have no checkpoint any more.
            and not any(session.reports for session in self._sessions.values())
        )
        return self._gathered(trainer, needed)

    def _export_at_end(self, trainer: Any, final: Callable[[], Mapping[str, Any]]) -> None:
        """Make sure that the best weights have a model."""
        if not self.cadence.at_end:
            return
        if trainer.fast_dev_run:
            self._dry_run(trainer, final())
            return
        best = best_checkpoint(trainer)
        if best is None:
            if not any(session.reports for session in self._sessions.values()):
                self._export_final(trainer, final())
            return
        lacking = [name for name in self._sessions if self._lacks_model(best, name)]
        if not lacking:
            return
        content = load_checkpoint(trainer.strategy, best)
        origin = replace(
            origin_of(trainer, best),
            epoch=content.get("epoch"),
            global_step=content.get("global_step"),
        )
        origin = with_best_score(trainer, origin, self._measured)
        self._save(trainer, content["state_dict"], best, origin, lacking, file_of(trainer, best))

    def _lacks_model(self, checkpoint: str, name: str) -> bool:
        """Tell whether a checkpoint has no model, and was not tried in vain."""
        path = self._model_path(checkpoint, name)
        reports = self._sessions[name].reports
        place = self._remote.url(path) or str(path)
        proven = any(report.ok and report.path == place for report in reports)
        failed = any(not report.ok and report.checkpoint == checkpoint for report in reports)
        return not failed and not (proven and path.exists())

    def _export_final(self, trainer: Any, final: Mapping[str, Any]) -> None:
        """Export the weights as they are when training ends: no checkpoint became a model."""
        origin = replace(origin_of(trainer, "", self._measured), checkpoint=None)
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        self._save(trainer, final, f"{self._root}/{name}", origin)

    def _dry_run(self, trainer: Any, final: Mapping[str, Any]) -> None:
        """``fast_dev_run`` leaves no files: prove that the module exports, and keep nothing."""
        for session in self._sessions.values():
            with tempfile.TemporaryDirectory(prefix="onnxport-") as folder:
                session.dry_run(
                    Saved(
                        state=final,
                        path=Path(folder) / "model.onnx",
                        origin=replace(origin_of(trainer, "", self._measured), checkpoint=None),
                        module=stand_in(trainer, final),
                    )
                )
                limit = 0.0 if self.background is None else self.background.drain_s
                session.drain(limit)

    # --- tracking and errors ----------------------------------------------------------------

    def _address(self, trainer: Any) -> RunAddress | None:
        """Find the run, and open an outbox to it."""
        self._outbox = self._run = None
        if self._mlflow is None or trainer.fast_dev_run:
            return None
        try:
            address = run_address(trainer, self._mlflow)
        except Exception as error:
            logger.exception("The MLflow run could not be found. Training goes on.")
            self._outbox = Unavailable(f"The MLflow run could not be found: {error}")
            return None
        if address is not None:
            inline = self.background is None
            self._outbox = InlineOutbox(address) if inline else ProcessOutbox(address)
        self._run = address
        return address

    def _finish_tracking(self, limit_s: float) -> None:
        end = time.monotonic() + max(0.0, limit_s)
        if self._outbox is not None:
            with _never_raises("the end of tracking"):
                self._outbox.drain(max(0.0, limit_s), lambda _: None)
        if self._page is not None:  # by now it can say what the server holds
            with _never_raises("the page of the run"):
                left = PAGE_S if self.background is None else end - time.monotonic()
                self._page.finish(min(PAGE_S, max(0.0, left)))
                if self._outbox is not None:
                    self._outbox.drain(max(0.0, end - time.monotonic()), lambda _: None)
        if self._outbox is not None:
            with _never_raises("the end of tracking"):
                self._outbox.close("FAILED" if self._failed else "FINISHED")

    def _raise_failure(self, trainer: Any) -> None:
        """Raise on all ranks or on none: a rank that leaves alone leaves the others waiting."""
        if self.on_error != "raise" and self.preflight != "raise":
            return
        early, self._early_failure = self._early_failure, None
        failures = [early]
        if self.on_error == "raise":
            failures += [session.take_failure() for session in self._sessions.values()]
        failure = next((one for one in failures if one is not None), None)
        if failure is not None and trainer.world_size == 1:
            raise failure
        if trainer.world_size > 1:
            message = trainer.strategy.broadcast(None if failure is None else str(failure))
            if message is not None:
                raise failure if failure is not None else ExportError(message)


def _is_of_tuner(path: str) -> bool:
    return Path(path).name.startswith(_TUNER_PREFIXES)


def _folder_here(root: str) -> Path:
    """Return a folder of this machine for a run: its own, or one in a cache."""
    if not is_remote(root):
        return Path(root)
    return user_cache_path("onnxport") / "runs" / short_name(root)


@contextmanager
def _never_raises(what: str) -> Iterator[None]:
    """The trainer is inside of a save or at its end: log the error, with its traceback, and go on.

    What an export can raise is in its report already; this is for user code and the framework.
    """
    try:
        yield
    except Exception:
        logger.exception("onnxport failed at %s. Training goes on.", what)
