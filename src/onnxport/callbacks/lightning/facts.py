"""What a trainer knows, as values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.report import Provenance
from onnxport.tracking.base import RunAddress

if TYPE_CHECKING:
    from onnxport.config import MLflow

__all__ = ["best_checkpoint", "is_redirected", "origin_of", "run_address", "with_best_score"]


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
    root = Path(trainer.default_root_dir).resolve()
    if options.tracking_uri is not None:
        return RunAddress(uri=options.tracking_uri, options=options)
    root.mkdir(parents=True, exist_ok=True)
    return RunAddress(
        uri=f"sqlite:///{root / 'mlflow.db'}",
        artifact_root=(root / "mlartifacts").as_uri(),
        options=options,
    )


def is_redirected(module: Any) -> bool:
    """Tell whether a call of the module is a step that a strategy routes through ``forward``.

    Source: ``lightning.pytorch.strategies.strategy._ForwardRedirection``, which sets
    ``wrapped_forward`` on the instance until it is called.
    """
    forward = vars(module).get("forward")
    return getattr(forward, "__name__", "") == "wrapped_forward"


def origin_of(trainer: Any, checkpoint: str) -> Provenance:
    """Return the metrics at the time of saving, and which of them decides what is best."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    monitored = next((cb for cb in trainer.checkpoint_callbacks if _monitor(cb) is not None), None)
    return Provenance(
        checkpoint=checkpoint,
        epoch=trainer.current_epoch,
        global_step=trainer.global_step,
        metrics=metrics,
        monitor=_monitor(monitored),
        mode="max" if getattr(monitored, "mode", "min") == "max" else "min",
    )


def _monitor(callback: Any) -> str | None:
    return getattr(callback, "monitor", None)


def best_checkpoint(trainer: Any) -> str | None:
    """Return the best checkpoint that is on disk."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", "")
        if best and Path(best).is_file():
            return str(best)
    return None


def with_best_score(trainer: Any, origin: Provenance) -> Provenance:
    """The current metrics are the last epoch's; of the best one only the score is known."""
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    if origin.monitor is None or score is None or not math.isfinite(float(score)):
        return replace(origin, metrics={})
    return replace(origin, metrics={origin.monitor: float(score)})
