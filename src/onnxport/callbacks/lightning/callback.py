"""The callback: translates Lightning's hooks and holds no line about ONNX."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from onnxport.callbacks.checkpoint_io import MirroredCheckpointIO
from onnxport.callbacks.lightning.facts import (
    best_checkpoint,
    checkpoint_roots,
    file_of,
    is_handed_over,
    is_redirected,
    origin_of,
    run_address,
    run_folder,
    shows_in_rich,
    with_best_score,
)
from onnxport.callbacks.lightning.links import links_of
from onnxport.callbacks.lightning.names import (
    FrameworkAware,
    framework_of,
    teller,
    unbound,
    unpickled,
)
from onnxport.callbacks.lightning.progress import add_status, remove_status
from onnxport.callbacks.lightning.rehearsal import rehearsal
from onnxport.callbacks.lightning.sharded import (
    gather_saves,
    is_sharded,
    live_state,
    load_checkpoint,
    stand_in,
)
from onnxport.callbacks.lightning.validation import ValidationWatch
from onnxport.callbacks.measured import Measured
from onnxport.callbacks.place import has_the_place, place_among
from onnxport.callbacks.remote import folder_here, is_remote
from onnxport.callbacks.run import OBSERVED_FIRST, SAME_NAMES, ExportRun
from onnxport.callbacks.settings import ExportCallback
from onnxport.callbacks.training import Training, Weights, never_raises
from onnxport.errors import ConfigurationError, ExportError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.unsharded import gathered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from onnxport.pipeline import Validation

__all__ = ["OnnxExport"]

logger = logging.getLogger(__name__)

_TUNER_PREFIXES = (".lr_find", ".scale_batch_size")
"""Checkpoints that the tuner writes for itself and removes again."""


class OnnxExport(ExportCallback, metaclass=FrameworkAware):
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

    @override
    def _reset(self) -> None:
        self._place: str | None = ""
        self._root = ""
        self._interrupted: list[str] = []
        self._on_its_way = ""
        self._measured = Measured()
        self._watch: ValidationWatch | None = None

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return unpickled, (unbound(type(self)), self._portable() | {"_watch": None})

    # --- hooks ------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._place = place_among(self, trainer.callbacks)
        if self._place is None and self.settings.on_error == "raise":
            raise ConfigurationError(SAME_NAMES)
        if self._place is None:
            return
        if is_sharded(trainer.strategy):
            gather_saves(
                trainer.strategy,
                id(self),
                lambda path: self._wants(trainer, path),
                lambda content, path: self._on_wanted(trainer, content, path),
                lambda reason, path: self._run.refused(reason, self._origin(trainer, path)),
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
        self._measured, roots = Measured(), checkpoint_roots(trainer)
        self._root = str(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if not trainer.is_global_zero:
            self._begin(ExportRun(self.settings))
            return
        here = [Path(folder) for folder in roots if not is_remote(folder)]
        training = Training(
            module=pl_module,
            root=self._root,
            roots=roots,
            address=partial(run_address, trainer, self.settings.mlflow),
            page=run_folder(trainer, folder_here(self._root)),
            goes_on=trainer.ckpt_path is not None,
            place=self._place,
            is_ours=partial(has_the_place, self, trainer.callbacks, here),
            is_redirected=is_redirected,
            fallback=lambda: getattr(pl_module, "example_input_array", None),
            say=teller(type(self)),
            in_rich=shows_in_rich(trainer),
            leaves_files=not trainer.fast_dev_run,
        )
        self._begin(ExportRun(self.settings, training))
        metrics = self.settings.options.metrics
        if metrics is not None and self._run.is_active:
            # Not of the callback, which is one of both Lightnings where both are imported.
            self._watch = ValidationWatch(metrics, framework_of(type(trainer)) or "")
        if self.settings.console and self._run.is_active:
            with never_raises("showing the last model"):
                add_status(trainer, lambda: self._run.status)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._run.count_batch()
        early = self._early_weights(trainer, pl_module)
        if self._run.is_active:
            self._run.linked(links_of(trainer))
            self._run.try_early(early)
            self._begin_batch(trainer, "training_step", batch, batch_idx)
        if trainer.world_size == 1:
            self._raise_failure(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._measured.begin(trainer.callback_metrics)
            if self._watch is not None:
                with never_raises("keeping batches of the validation"):
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
            with never_raises("keeping a batch of the validation"):
                self._watch.batch(batch, dataloader_idx)

    def _begin_batch(self, trainer: Any, step: str, batch: Any, *indices: int) -> None:
        def rehearse(method: Any) -> Callable[[Any, Any], Any] | None:
            if is_sharded(trainer.strategy):  # a copy of a part cannot run a step
                return None
            return rehearsal(step, trainer, *indices, method=method)

        self._run.begin_batch(batch, rehearse)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._raise_failure(trainer)
        self._run.begin_epoch(trainer.current_epoch)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        final = self._final_weights(trainer, pl_module)
        best = best_checkpoint(trainer)
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        self._run.finish(
            best,
            stored=lambda: self._stored(trainer, str(best)),
            final=(f"{self._root}/{name}", lambda: self._weights(trainer, final(), None)),
            links=lambda: links_of(trainer),
        )
        remove_status(trainer)
        self._raise_failure(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        interrupted = dict.fromkeys(self._interrupted if self._run.is_active else ())
        self._interrupted.clear()
        for path in interrupted:
            self._begin_again(trainer, path)
        self._on_its_way = ""
        with never_raises("showing the last model"):
            remove_status(trainer)
        self._run.fail(links=lambda: links_of(trainer))

    # --- weights ----------------------------------------------------------------------------

    def _origin(self, trainer: Any, path: str) -> Any:
        return origin_of(trainer, path, self._measured)

    def _weights(self, trainer: Any, state: Mapping[str, Any], path: str | None) -> Weights:
        origin = self._origin(trainer, path or "")
        return Weights(
            state=state,
            origin=origin if path else replace(origin, checkpoint=None),
            file=file_of(trainer, path) if path else None,
            whole=partial(stand_in, trainer, state),
            validation=self._validation,
        )

    def _validation(self) -> Validation | None:
        return None if self._watch is None else self._watch.next()

    def _stored(self, trainer: Any, path: str) -> Weights:
        """Read a checkpoint of this training."""
        content = load_checkpoint(trainer.strategy, path)
        origin = replace(
            origin_of(trainer, path),
            epoch=content.get("epoch"),
            global_step=content.get("global_step"),
        )
        weights = self._weights(trainer, content["state_dict"], path)
        return replace(weights, origin=with_best_score(trainer, origin, self._measured))

    def _early_weights(self, trainer: Any, pl_module: Any) -> Callable[[], Weights | None] | None:
        """Return what gives the weights for a trial; ``None``: now is not the time for one."""
        if self._place is None or self.settings.preflight is None or trainer.fast_dev_run:
            return None
        if not is_sharded(trainer.strategy):
            return lambda: self._weights(trainer, pl_module.state_dict(), None)
        if self._run.batches != OBSERVED_FIRST + 1:
            return None
        needed = False
        with never_raises("the export before the first checkpoint"):
            needed = self._run.awaits_trial
        whole = self._gathered(trainer, needed)
        return lambda: self._weights(trainer, whole(), None) if whole() else None

    def _final_weights(self, trainer: Any, pl_module: Any) -> Callable[[], Mapping[str, Any]]:
        """Return what gives the weights as they are at the end, whole on rank zero."""
        if not is_sharded(trainer.strategy):
            return lambda: dict(pl_module.state_dict())
        needed = self._run.needs_final_weights and best_checkpoint(trainer) is None
        return self._gathered(trainer, needed)

    def _gathered(self, trainer: Any, needed: bool) -> Callable[[], Mapping[str, Any]]:
        """Put whole weights together on rank zero; all processes do, or none does."""
        whole: dict[str, Any] = {}
        if trainer.strategy.broadcast(needed):
            with never_raises("gathering the weights"):
                whole = gathered(live_state(trainer.strategy), keep=needed)
        return lambda: whole

    # --- checkpoints ------------------------------------------------------------------------

    def _on_saving(self, path: str) -> None:
        if not _is_of_tuner(path):
            self._run.saving(path)

    # The seam is made before the run, and stays when another one begins.
    def _on_removing(self, path: str) -> None:
        self._run.removing(path)

    def _on_removed(self, path: str) -> None:
        self._run.removed(path)

    def _wants(self, trainer: Any, path: str) -> bool:
        return not _is_of_tuner(path) and self._run.wants(
            path, lambda: self.should_export(trainer, path)
        )

    def _on_saved(self, trainer: Any, content: dict[str, Any], path: str) -> None:
        # Without it, weights are on their way home from a process of ddp_spawn.
        if "state_dict" in content and self._wants(trainer, path):
            self._on_its_way = path
            self._on_wanted(trainer, content, path)
            self._on_its_way = ""
        elif "state_dict" not in content:
            self._run.pass_over(path)

    def _on_wanted(
        self,
        trainer: Any,
        content: dict[str, Any],
        path: str,
        only: Iterable[str] | None = None,
    ) -> None:
        weights = partial(self._weights, trainer, content["state_dict"], path)
        self._run.saved(path, weights, only, handed_over=partial(is_handed_over, trainer, path))

    def _begin_again(self, trainer: Any, path: str) -> None:
        """Make the models of a checkpoint whose save was broken off, if it is there after all."""
        with never_raises(f"exporting {path}"):
            file = file_of(trainer, path)
            decided = path == self._on_its_way  # for each checkpoint once: some wants every third
            if file is None or not (decided or self._wants(trainer, path)):
                return
            state = read_state_dict(file)
            lacking = self._run.lacking(path, state)
            if lacking:
                self._on_wanted(trainer, {"state_dict": state}, path, lacking)

    def _raise_failure(self, trainer: Any) -> None:
        """Raise on all ranks or on none: a rank that leaves alone leaves the others waiting."""
        if self.settings.on_error != "raise" and self.settings.preflight != "raise":
            return
        failure = self._run.take_failure()
        if failure is not None and trainer.world_size == 1:
            raise failure
        if trainer.world_size > 1:
            message = trainer.strategy.broadcast(None if failure is None else str(failure))
            if message is not None:
                raise failure if failure is not None else ExportError(message)


def _is_of_tuner(path: str) -> bool:
    return Path(path).name.startswith(_TUNER_PREFIXES)
