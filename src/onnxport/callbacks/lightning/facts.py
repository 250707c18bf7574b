"""What a trainer knows, as values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.address import own_run
from onnxport.callbacks.measured import Measured
from onnxport.callbacks.remote import is_remote, remote_exists
from onnxport.exporter.checkpoint_file import is_checkpoint
from onnxport.report import Provenance
from onnxport.tracking.base import RunAddress

if TYPE_CHECKING:
    from onnxport.config import MLflow

__all__ = [
    "best_checkpoint",
    "checkpoint_roots",
    "file_of",
    "is_handed_over",
    "is_redirected",
    "origin_of",
    "run_address",
    "run_folder",
    "shows_in_rich",
    "with_best_score",
]


def run_address(trainer: Any, mlflow: tuple[str, MLflow] | None) -> RunAddress | None:
    """Find the run: that of the trainer's ``MLFlowLogger``, or one of our own if asked for."""
    if mlflow is None:
        return None
    eagerness, options = mlflow
    for found in trainer.loggers:
        if any(base.__name__ == "MLFlowLogger" for base in type(found).__mro__):
            prefix = getattr(found, "_prefix", "")
            return RunAddress(
                uri=found.experiment.tracking_uri,
                run_id=found.run_id,
                experiment_id=found.experiment_id,
                metric_prefix=f"{prefix}{found.LOGGER_JOIN_CHAR}" if prefix else "",
                options=options,
            )
    if eagerness == "auto":
        return None
    return own_run(options, trainer.default_root_dir)


def is_redirected(module: Any) -> bool:
    """Tell whether a call of the module is a step that a strategy routes through ``forward``.

    Source: ``lightning.pytorch.strategies.strategy._ForwardRedirection``, which sets
    ``wrapped_forward`` on the instance until it is called.
    """
    forward = vars(module).get("forward")
    return getattr(forward, "__name__", "") == "wrapped_forward"


def origin_of(trainer: Any, checkpoint: str, measured: Measured | None = None) -> Provenance:
    """Return the metrics of the weights that are saved, and which of them decides what is best."""
    metrics = trainer.callback_metrics
    deciding = _deciding(trainer)
    return Provenance(
        checkpoint=checkpoint,
        epoch=trainer.current_epoch,
        global_step=trainer.global_step,
        metrics=(measured or Measured()).fresh(metrics, trainer.global_step),
        monitor=getattr(deciding, "monitor", None),
        mode="max" if getattr(deciding, "mode", "min") == "max" else "min",
    )


def is_handed_over(trainer: Any, checkpoint: str) -> bool:
    """Tell whether a checkpoint's folder is given away as soon as it is saved, and then removed.

    Ray Train's callback reports it so: a model that comes later would not be in it.
    """
    prefixes = (getattr(callback, "tmpdir_prefix", None) for callback in trainer.callbacks)
    return any(prefix and Path(checkpoint).is_relative_to(prefix) for prefix in prefixes)


def checkpoint_roots(trainer: Any) -> list[str]:
    """Return the folders that checkpoints are written to."""
    folders = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
    return [str(folder) for folder in folders if folder]


def run_folder(trainer: Any, otherwise: Path) -> Path:
    """Return the folder of a run on this machine: the one around its checkpoints.

    Args:
        trainer: The trainer.
        otherwise: Where there are none, or they are elsewhere.
    """
    here = [Path(root) for root in checkpoint_roots(trainer) if not is_remote(root)]
    if not here:
        return otherwise
    return here[0].parent if here[0].name == "checkpoints" else here[0]


def shows_in_rich(trainer: Any) -> bool:
    """Tell whether the progress bar is one of rich."""
    bar = getattr(trainer, "progress_bar_callback", None)
    return bar is not None and "Rich" in type(bar).__name__


def _deciding(trainer: Any) -> Any:
    """Return the one callback that says what is best: the first with a monitor, else the first."""
    callbacks = trainer.checkpoint_callbacks
    with_monitor = (cb for cb in callbacks if getattr(cb, "monitor", None) is not None)
    return next(with_monitor, next(iter(callbacks), None))


def best_checkpoint(trainer: Any) -> str | None:
    """Return the best checkpoint that is on disk."""
    for callback in (_deciding(trainer), *trainer.checkpoint_callbacks):
        best = getattr(callback, "best_model_path", "")
        if best and (remote_exists(best) if is_remote(best) else is_checkpoint(Path(best))):
            return str(best)
    return None


def file_of(trainer: Any, checkpoint: str) -> Path | None:
    """Return the file of a checkpoint that was just saved, if its content can be read from it.

    Other plugins may write later, elsewhere, or in a format of their own.
    """
    plugin = trainer.strategy.checkpoint_io
    plugin = getattr(plugin, "inner", plugin)
    path = Path(checkpoint)
    return path if type(plugin).__name__ == "TorchCheckpointIO" and path.is_file() else None


def with_best_score(
    trainer: Any, origin: Provenance, measured: Measured | None = None
) -> Provenance:
    """The current metrics are the last epoch's; of the best one only the score is known."""
    if origin.monitor is None:
        return replace(origin, metrics={})
    deciding = _deciding(trainer)
    score = getattr(deciding, "best_model_score", None)
    if score is None or str(getattr(deciding, "best_model_path", "")) != origin.checkpoint:
        score = math.nan
    value = (measured or Measured()).at(origin.monitor, origin.global_step, float(score))
    return replace(origin, metrics={origin.monitor: value} if math.isfinite(value) else {})
