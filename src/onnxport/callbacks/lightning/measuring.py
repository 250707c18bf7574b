"""What the validation runs of a fit measure, and their batches where models are measured, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from onnxport.callbacks.lightning.names import framework_of
from onnxport.callbacks.lightning.validation import ValidationWatch
from onnxport.callbacks.measured import Measured
from onnxport.callbacks.training import never_raises

if TYPE_CHECKING:
    from onnxport.config import Metrics
    from onnxport.pipeline import Validation

__all__ = ["Measuring"]


class Measuring:
    """Follows the validation runs of one fit; none of it raises.

    Attributes:
        measured: Which metrics are of which weights.
    """

    def __init__(self) -> None:
        self.measured = Measured()
        self._watch: ValidationWatch | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_watch": None}  # which has a file open

    def keep_batches(self, trainer: Any, options: Metrics) -> None:
        """Keep batches from now on: models are validated with them.

        Args:
            trainer: Lightning's trainer.
            options: How many are wanted.
        """
        # Not of the callback, which is one of both Lightnings where both are imported.
        self._watch = ValidationWatch(options, framework_of(type(trainer)) or "")

    def begin(self, trainer: Any) -> None:
        """A validation run begins."""
        if trainer.sanity_checking:
            return
        self.measured.begin(trainer.callback_metrics)
        if self._watch is not None:
            with never_raises("keeping batches of the validation"):
                self._watch.begin(len(trainer.num_val_batches))

    def batch(self, trainer: Any, batch: Any, loader: int) -> None:
        """A batch is about to be validated."""
        if self._watch is not None and not trainer.sanity_checking:
            with never_raises("keeping a batch of the validation"):
                self._watch.batch(batch, loader)

    def end(self, trainer: Any) -> None:
        """A validation run is over."""
        if trainer.sanity_checking:
            return
        self.measured.end(trainer.callback_metrics, trainer.global_step)
        if self._watch is not None:
            self._watch.end()

    def next(self) -> Validation | None:
        """Return what the next checkpoint's model is validated with; ``None``: with nothing."""
        return None if self._watch is None else self._watch.next()
