"""The adapter for PyTorch-Ignite: ``OnnxExport().attach(trainer, checkpoint)``."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnxport._optional import optional_import
from onnxport.callbacks.adapter import LoopCallback, bare, is_first_process, weights_of
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.mirrored_saver import mirrored
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.training import Training, Weights
from onnxport.errors import ConfigurationError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["OnnxExport"]


class OnnxExport(LoopCallback):
    """Turns every checkpoint of Ignite's handlers into a proven ONNX model.

    The score that a ``Checkpoint`` or ``ModelCheckpoint`` keeps files by decides which is best.

    Args:
        options: As of :class:`onnxport.OnnxExport`, but ``validate_metrics``.

    Example:
        >>> from onnxport.callbacks.ignite import OnnxExport
        >>> OnnxExport(when="end").reports
        []
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._module: Any = None
        self._checkpoint: Any = None
        self._trainer: Any = None

    def attach(
        self, trainer: Any, checkpoint: Any = None, *, model: nn.Module | None = None
    ) -> OnnxExport:
        """Follow a trainer and a handler that saves.

        Args:
            trainer: The ``Engine`` that trains.
            checkpoint: A ``Checkpoint`` or ``ModelCheckpoint`` whose files are on this machine;
                ``None``: the final weights become a model.
            model: What is exported; default: the one module that the handler saves.

        Returns:
            This callback.

        Raises:
            ConfigurationError: If the module is not clear, or the handler saves elsewhere.
            MissingDependencyError: If Ignite is not installed.
        """
        with optional_import(extra="ignite", needed_for="Ignite's handler"):
            from ignite.engine import Events
        self._module = bare(_only_module(checkpoint) if model is None else model)
        self._checkpoint, self._trainer = checkpoint, trainer
        if checkpoint is not None:
            checkpoint.save_handler = mirrored(checkpoint.save_handler, self)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._iteration)
        trainer.add_event_handler(Events.COMPLETED, self._complete)
        self._watch_run(trainer)
        return self

    def _watch_run(self, trainer: Any) -> None:
        """Notice errors: a handler of theirs would keep Ignite from raising them."""
        run = trainer.run

        @wraps(run)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            finally:
                self._fail()  # nothing, if training was completed

        trainer.run = watched

    # --- events -----------------------------------------------------------------------------

    def _start(self, trainer: Any) -> None:
        folder = "." if self._checkpoint is None else str(self._checkpoint.save_handler.dirname)
        training = Training(
            module=self._module,
            root=folder,
            roots=(folder,),
            address=lambda: active_or_own_run(self.settings.mlflow, folder),
            page=Path(folder),
            goes_on=trainer.state.iteration > 0,
            place=self._place(trainer, folder),
            say=print,
        )
        self._final = f"{folder}/model.pt"
        self._begin(ExportRun(self.settings, training if is_first_process() else None))

    def _iteration(self, trainer: Any) -> None:
        self._run.step(self._weights, trainer.state.batch)
        self._raise_failure()

    def _complete(self, _: Any) -> None:
        saved = None if self._checkpoint is None else self._checkpoint.last_checkpoint
        best = None if saved is None else str(saved)
        self._finish(
            best,
            stored=lambda: Weights(
                state=read_state_dict(Path(str(best)), "model"), origin=self._origin(best)
            ),
            final=(self._final, self._weights),
        )
        self._raise_failure()

    # --- checkpoints ------------------------------------------------------------------------

    def saving(self, path: str) -> None:
        """A checkpoint is about to be saved."""
        self._run.saving(path)

    def saved(self, path: str, content: Mapping[str, Any], score: Mapping[str, Any]) -> None:
        """A checkpoint was saved.

        Args:
            path: Of its file.
            content: What it holds.
            score: What Ignite says of it: ``score_name`` and ``priority``.
        """
        state = weights_of(content, self._module)
        if state is None:
            self._run.pass_over(path)
        elif self._wants(self._trainer, path):
            origin = self._origin(path, score)
            self._run.saved(path, lambda: Weights(state=state, origin=origin))

    def removing(self, path: str) -> None:
        """A checkpoint is about to be removed."""
        self._run.removing(path)

    def removed(self, path: str) -> None:
        """A checkpoint was removed."""
        self._run.removed(path)

    def _weights(self) -> Weights:
        return Weights(state=dict(self._module.state_dict()), origin=self._origin(None))

    def _origin(self, path: str | None, score: Mapping[str, Any] | None = None) -> Provenance:
        state = self._trainer.state
        name = None if self._checkpoint is None else self._checkpoint.score_name
        metrics = {
            key: float(value)
            for key, value in state.metrics.items()
            if isinstance(value, (int, float))
            or (isinstance(value, torch.Tensor) and value.numel() == 1)
        }
        if name and score and score.get("priority") is not None:
            metrics[name] = float(score["priority"])
        return Provenance(
            checkpoint=path,
            epoch=state.epoch,
            global_step=state.iteration,
            metrics=metrics,
            monitor=name,
            mode="max",  # Ignite keeps the highest
        )


def _only_module(checkpoint: Any) -> nn.Module:
    """Return the one module that a handler saves.

    Raises:
        ConfigurationError: If there is none, or several.
    """
    saved = getattr(checkpoint, "to_save", None) or {}
    modules = {name: one for name, one in saved.items() if isinstance(one, torch.nn.Module)}
    if len(modules) != 1:
        raise ConfigurationError(
            f"Which module is exported? The handler saves {list(modules) or 'none'}. Give "
            "attach(trainer, checkpoint, model=...)."
        )
    return next(iter(modules.values()))
