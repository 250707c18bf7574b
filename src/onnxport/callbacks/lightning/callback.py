"""The callback: translates Lightning's hooks and holds no line about ONNX."""

from __future__ import annotations

from functools import partial
from typing import Any

from typing_extensions import override

from onnxport.callbacks.lightning.begin import training_of
from onnxport.callbacks.lightning.facts import best_checkpoint
from onnxport.callbacks.lightning.links import links_of
from onnxport.callbacks.lightning.measuring import Measuring
from onnxport.callbacks.lightning.names import FrameworkAware, unbound, unpickled
from onnxport.callbacks.lightning.progress import add_status, remove_status
from onnxport.callbacks.lightning.rehearsal import rehearsals
from onnxport.callbacks.lightning.saves import Saves
from onnxport.callbacks.lightning.weights import TrainerWeights
from onnxport.callbacks.place import place_among
from onnxport.callbacks.run import SAME_NAMES, ExportRun
from onnxport.callbacks.settings import ExportCallback
from onnxport.callbacks.training import never_raises
from onnxport.errors import ConfigurationError, ExportError

__all__ = ["OnnxExport"]


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
        self._measuring = Measuring()
        self._weights: TrainerWeights | None = None
        self._saves: Saves | None = None

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        of_one_fit = {"_measuring": Measuring(), "_weights": None, "_saves": None}
        return unpickled, (unbound(type(self)), self._portable() | of_one_fit)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._place = place_among(self, trainer.callbacks)
        if self._place is None and self.settings.on_error == "raise":
            raise ConfigurationError(SAME_NAMES)
        self._measuring = Measuring()
        self._weights = TrainerWeights(trainer, self._measuring)
        decide = partial(self.should_export, trainer)
        self._saves = Saves(trainer, self._weights, lambda: self._run, decide)
        if self._place is not None:
            self._saves.listen(id(self))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._root = str(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        first = trainer.is_global_zero
        training = training_of(trainer, self, self._root, self._place) if first else None
        self._begin(ExportRun(self.settings, training))
        if not self._run.is_active:
            return
        if self.settings.options.metrics is not None:
            self._measuring.keep_batches(trainer, self.settings.options.metrics)
        if self.settings.console:
            with never_raises("showing the last model"):
                add_status(trainer, lambda: self._run.status)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._run.count_batch()
        tries = self._place is not None and self.settings.preflight is not None
        early = self._weights.early(self._run) if tries and self._weights else None
        if self._run.is_active:
            self._run.linked(links_of(trainer))
            self._run.try_early(early)
            self._run.begin_batch(batch, rehearsals("training_step", trainer, batch_idx))
        if trainer.world_size == 1:
            self._raise_failure(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._measuring.begin(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._measuring.end(trainer)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        indices = (batch_idx, dataloader_idx)
        self._run.begin_batch(batch, rehearsals("validation_step", trainer, *indices))
        self._measuring.batch(trainer, batch, dataloader_idx)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._raise_failure(trainer)
        self._run.begin_epoch(trainer.current_epoch)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        weights = self._weights or TrainerWeights(trainer, self._measuring)
        best = best_checkpoint(trainer)
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        self._run.finish(
            best,
            stored=lambda: weights.stored(str(best)),
            final=(f"{self._root}/{name}", weights.final(self._run)),
            links=lambda: links_of(trainer),
        )
        remove_status(trainer)
        self._raise_failure(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._saves is not None:
            self._saves.begin_interrupted_again()
        with never_raises("showing the last model"):
            remove_status(trainer)
        self._run.fail(links=lambda: links_of(trainer))

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
