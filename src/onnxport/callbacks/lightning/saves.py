"""Every checkpoint that a fit writes and removes, told to the run that makes models of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.checkpoint_io import MirroredCheckpointIO
from onnxport.callbacks.lightning.facts import file_of, is_handed_over
from onnxport.callbacks.lightning.sharded import gather_saves, is_sharded
from onnxport.callbacks.training import never_raises
from onnxport.exporter.checkpoint_file import read_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnxport.callbacks.lightning.weights import TrainerWeights
    from onnxport.callbacks.run import ExportRun

__all__ = ["Saves"]

_TUNER_PREFIXES = (".lr_find", ".scale_batch_size")
"""Checkpoints that the tuner writes for itself and removes again."""


class Saves:
    """Listens to the checkpoint plugin of a trainer, and to strategies that pass it by.

    Args:
        trainer: Lightning's trainer.
        weights: Gives what is saved.
        run: Gives the run: the seam is made before it, and stays when another one begins.
        decide: Tells whether the checkpoint of a path becomes a model; a user's, may raise.
    """

    def __init__(
        self,
        trainer: Any,
        weights: TrainerWeights,
        run: Callable[[], ExportRun],
        decide: Callable[[str], bool],
    ) -> None:
        self._trainer, self._weights, self._run, self._decide = trainer, weights, run, decide
        self._interrupted: list[str] = []
        self._on_its_way = ""

    def listen(self, key: int) -> None:
        """Listen from now on; to be called in all processes.

        Args:
            key: Who listens; who listens again takes the place of their earlier self.
        """
        strategy = self._trainer.strategy
        if is_sharded(strategy):
            gather_saves(
                strategy,
                key,
                self._wants,
                self._export,
                lambda reason, path: self._run().refused(reason, self._weights.origin(path)),
                self._saving,
            )
        if not self._trainer.is_global_zero:
            return
        if not isinstance(strategy.checkpoint_io, MirroredCheckpointIO):
            strategy.checkpoint_io = MirroredCheckpointIO(strategy.checkpoint_io)
        strategy.checkpoint_io.listen(
            key,
            self._saved,
            lambda path: self._run().removed(path),
            on_interrupted=self._interrupted.append,
            on_saving=self._saving,
            on_removing=lambda path: self._run().removing(path),
        )

    def begin_interrupted_again(self) -> None:
        """Make the models of checkpoints whose save was broken off, if they are there after all."""
        interrupted = dict.fromkeys(self._interrupted if self._run().is_active else ())
        self._interrupted.clear()
        for path in interrupted:
            with never_raises(f"exporting {path}"):
                self._begin_again(path)
        self._on_its_way = ""

    def _saving(self, path: str) -> None:
        if not _is_of_tuner(path):
            self._run().saving(path)

    def _wants(self, path: str) -> bool:
        return not _is_of_tuner(path) and self._run().wants(path, lambda: self._decide(path))

    def _saved(self, content: dict[str, Any], path: str) -> None:
        # Without it, weights are on their way home from a process of ddp_spawn.
        if "state_dict" in content and self._wants(path):
            self._on_its_way = path
            self._export(content, path)
            self._on_its_way = ""
        elif "state_dict" not in content:
            self._run().pass_over(path)

    def _export(
        self, content: dict[str, Any], path: str, only: Iterable[str] | None = None
    ) -> None:
        weights = partial(self._weights.of, content["state_dict"], path)
        handed_over = partial(is_handed_over, self._trainer, path)
        self._run().saved(path, weights, only, handed_over=handed_over)

    def _begin_again(self, path: str) -> None:
        file = file_of(self._trainer, path)
        decided = path == self._on_its_way  # for each checkpoint once: some wants every third
        if file is None or not (decided or self._wants(path)):
            return
        state = read_state_dict(file)
        lacking = self._run().lacking(path, state)
        if lacking:
            self._export({"state_dict": state}, path, lacking)


def _is_of_tuner(path: str) -> bool:
    return Path(path).name.startswith(_TUNER_PREFIXES)
