"""The adapter for Hugging Face's Trainer: ``Trainer(callbacks=[OnnxExport()])``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from onnxport._files import is_there
from onnxport._optional import optional_import
from onnxport.callbacks.adapter import LoopCallback, bare
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.pretrained import (
    Dated,
    companions_in,
    first_rows,
    notes_of,
    numbers_of,
    without_autocast,
)
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.spread import IN_PARTS, is_in_parts
from onnxport.callbacks.training import Training, Weights
from onnxport.exporter.checkpoint_file import PRETRAINED, read_state_dict, weights_in_folder
from onnxport.exporter.tied import tied_names, with_tied
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

__all__ = ["OnnxExport"]

with optional_import(extra="transformers", needed_for="The callback of Hugging Face's Trainer"):
    from transformers import TrainerCallback
    from transformers.utils.generic import find_labels

_OF_LOSS = frozenset({"num_items_in_batch", "return_loss"})
"""What the Trainer itself adds to a call."""


class OnnxExport(LoopCallback, TrainerCallback):  # type: ignore[misc]
    """Turns every checkpoint of a Trainer into a proven ONNX model, ``checkpoint-N/model.onnx``.

    The model gets what the model got in training without labels, and gives no loss. The tokenizer's
    and the configuration's files, which the Trainer saves beside it, go with it to MLflow.

    Args:
        options: As of :class:`onnxport.OnnxExport`, but ``validate_metrics``.

    Example:
        >>> from onnxport.callbacks.transformers import OnnxExport
        >>> OnnxExport(when="end").reports
        []
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._metrics: tuple[int, dict[str, float]] = -1, {}

    # --- events -----------------------------------------------------------------------------

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._module, self._args, self._state = bare(given["model"]), args, state
        root = str(args.output_dir)
        training = Training(
            module=self._module,
            root=root,
            roots=(root,),
            address=lambda: active_or_own_run(self.settings.mlflow, root),
            page=Path(root),
            goes_on=state.global_step > 0,
            place=self._place(state),
            fallback=partial(first_rows, given.get("train_dataloader")),
            labels=partial(_labels, named=args.label_names),
            say=print,
        )
        self._in_parts = is_in_parts(self._module)
        active = state.is_world_process_zero
        self._begin(ExportRun(self.settings, training if active else None))
        self._dated = Dated(state, lambda: Path(root).glob("checkpoint-*"))

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self._in_parts:
            with without_autocast(self._module):
                self._run.step(self._weights)
        if args.world_size == 1:
            self._raise_failure()

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if control.should_save:
            self._run.saving(self._checkpoint(state))

    on_epoch_end = on_step_end

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._metrics = state.global_step, numbers_of(given.get("metrics") or {})

    @override
    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self._run.is_active:
            return
        self._look_for_removed()
        checkpoint = self._checkpoint(state)
        self._run.saving(checkpoint)
        self._remember(checkpoint)
        wanted = self._wants(given["model"], checkpoint)
        if wanted and self._in_parts:
            self._run.refused(IN_PARTS, self._origin(checkpoint))
            self._run.pass_over(checkpoint)  # it is owed by nobody
        elif wanted:
            with without_autocast(self._module):
                self._run.saved(checkpoint, partial(self._weights, checkpoint))

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._dated.stop()
        self._look_for_removed()
        best = None if self._in_parts else self._best(state)
        if self._in_parts and not self._run.reports:
            self._run.refused(IN_PARTS, self._origin(None))
        with without_autocast(self._module):
            self._finish(
                best,
                stored=None if best is None else partial(self._stored, best),
                final=None
                if self._in_parts
                else (f"{args.output_dir}/{PRETRAINED[0]}", self._weights),
            )
        if args.world_size == 1:
            self._raise_failure()

    # --- weights ----------------------------------------------------------------------------

    def _checkpoint(self, state: Any) -> str:
        """Return the file of a checkpoint's weights, or what it would be."""
        return _weights_in(Path(self._args.output_dir, f"checkpoint-{state.global_step}"))

    @override
    def _is_there(self, checkpoint: str) -> bool:
        return Path(checkpoint).parent.is_dir()  # an adapter's weights have another name

    def _weights(self, checkpoint: str | None = None) -> Weights:
        return Weights(state=dict(self._module.state_dict()), origin=self._origin(checkpoint))

    def _stored(self, checkpoint: str) -> Weights:
        state = with_tied(read_state_dict(Path(checkpoint), ""), tied_names(self._module))
        return Weights(state=state, origin=self._origin(checkpoint))

    def _best(self, state: Any) -> str | None:
        """Return the best checkpoint, or the last one."""
        if state.best_model_checkpoint:
            best = _weights_in(Path(state.best_model_checkpoint))
            return best if is_there(Path(best)) else None
        there = [path for path in self._saved_paths if is_there(Path(path))]
        return there[-1] if there else None

    def _origin(self, checkpoint: str | None) -> Provenance:
        state, monitor = self._state, self._args.metric_for_best_model
        name = monitor and (monitor if monitor.startswith("eval_") else f"eval_{monitor}")
        folder = None if checkpoint is None else Path(checkpoint).parent
        step = state.global_step
        if folder is not None and folder.name.partition("-")[2].isdecimal():
            step = int(folder.name.partition("-")[2])
        measured_at, metrics = self._metrics
        if step != measured_at:
            metrics = {}
            if step == state.best_global_step and name and state.best_metric is not None:
                metrics = {name: float(state.best_metric)}
        return Provenance(
            checkpoint=checkpoint,
            epoch=int(state.epoch or 0) if step == state.global_step else None,
            global_step=step,
            metrics=metrics,
            monitor=name or None,
            mode="max" if self._args.greater_is_better else "min",
            notes=notes_of(self._module),
            beside=[] if folder is None else companions_in(folder),
        )


def _weights_in(folder: Path) -> str:
    found = weights_in_folder(folder)
    return str(found if found != folder else folder / PRETRAINED[0])


def _labels(module: nn.Module, named: Collection[str] | None) -> Collection[str]:
    """Name what of a call only the loss needs."""
    return {*(named or ()), *find_labels(type(module)), *_OF_LOSS}
