"""Weights of a Lightning training: as they are, as they are saved, and as a checkpoint has them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.lightning.facts import (
    best_checkpoint,
    file_of,
    origin_of,
    with_best_score,
)
from onnxport.callbacks.lightning.sharded import (
    is_sharded,
    live_state,
    load_checkpoint,
    stand_in,
)
from onnxport.callbacks.run import OBSERVED_FIRST
from onnxport.callbacks.training import Weights, never_raises
from onnxport.exporter.unsharded import gathered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from onnxport.callbacks.lightning.measuring import Measuring
    from onnxport.callbacks.run import ExportRun
    from onnxport.report import Provenance

__all__ = ["TrainerWeights"]


class TrainerWeights:
    """Gives the weights of one fit, whole where each process has a part of them.

    Args:
        trainer: Lightning's trainer.
        measuring: What its validation runs measure.
    """

    def __init__(self, trainer: Any, measuring: Measuring) -> None:
        self._trainer, self._measuring = trainer, measuring

    def origin(self, path: str) -> Provenance:
        """Return what is known of a checkpoint that is saved now."""
        return origin_of(self._trainer, path, self._measuring.measured)

    def of(self, state: Mapping[str, Any], path: str | None = None) -> Weights:
        """Return weights as they are now.

        Args:
            state: The whole ``state_dict``.
            path: Of the checkpoint that they are saved in; ``None``: in none.
        """
        trainer, origin = self._trainer, self.origin(path or "")
        return Weights(
            state=state,
            origin=origin if path else replace(origin, checkpoint=None),
            file=file_of(trainer, path) if path else None,
            whole=partial(stand_in, trainer, state),
            validation=self._measuring.next,
        )

    def stored(self, path: str) -> Weights:
        """Read a checkpoint of this training."""
        trainer = self._trainer
        content = load_checkpoint(trainer.strategy, path)
        origin = replace(
            origin_of(trainer, path),
            epoch=content.get("epoch"),
            global_step=content.get("global_step"),
        )
        scored = with_best_score(trainer, origin, self._measuring.measured)
        return replace(self.of(content["state_dict"], path), origin=scored)

    def early(self, run: ExportRun) -> Callable[[], Weights | None] | None:
        """Return what gives the weights for a trial; ``None``: now is not the time for one.

        To be called in all processes, at the same batch.
        """
        trainer = self._trainer
        if trainer.fast_dev_run:
            return None
        if not is_sharded(trainer.strategy):
            return lambda: self.of(trainer.lightning_module.state_dict())
        if run.batches != OBSERVED_FIRST + 1:
            return None
        needed = False
        with never_raises("the export before the first checkpoint"):
            needed = run.awaits_trial
        whole = self._gathered(needed)
        return lambda: self.of(whole()) if whole() else None

    def final(self, run: ExportRun) -> Callable[[], Weights]:
        """Return what gives the weights at the end; to be called in all processes."""
        trainer = self._trainer
        if not is_sharded(trainer.strategy):
            return lambda: self.of(dict(trainer.lightning_module.state_dict()))
        whole = self._gathered(run.needs_final_weights and best_checkpoint(trainer) is None)
        return lambda: self.of(whole())

    def _gathered(self, needed: bool) -> Callable[[], Mapping[str, Any]]:
        """Put whole weights together on rank zero; all processes do, or none does."""
        strategy = self._trainer.strategy
        whole: dict[str, Any] = {}
        if strategy.broadcast(needed):
            with never_raises("gathering the weights"):
                whole = gathered(live_state(strategy), keep=needed)
        return lambda: whole
