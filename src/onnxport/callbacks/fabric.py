"""The adapter for Lightning Fabric: ``Fabric(callbacks=[OnnxExport()])`` and ``fabric.save``."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from onnxport.callbacks.adapter import LoopCallback, bare
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.mirrored_saver import MirroredSave
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.spread import Spread
from onnxport.callbacks.training import Training, Weights
from onnxport.errors import ExportError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OnnxExport"]

_STEPS = ("step", "global_step", "iteration")
"""What people call the number of steps that they save."""
_WEIGHTS = "model"
"""Where they have the weights; if not there, they are found."""


class OnnxExport(LoopCallback):
    """Turns every checkpoint that ``fabric.save`` writes into a proven ONNX model.

    The module is the first one that ``fabric.setup`` gets. Where training is over is said with
    ``fabric.call("on_train_end")``, else it is when Python ends. Metrics of a checkpoint are the
    numbers that are saved with it.

    Args:
        monitor: Name of the number that decides which checkpoint is best.
        mode: ``"min"`` or ``"max"`` for that number.
        folder: Of the run: its page, and the model where there is no checkpoint.
        options: As of :class:`onnxport.OnnxExport`, but ``validate_metrics``.

    Example:
        >>> from onnxport.callbacks.fabric import OnnxExport
        >>> OnnxExport(monitor="val_loss").reports
        []
    """

    def __init__(
        self,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        folder: str | os.PathLike[str] = ".",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._monitor, self._mode, self._folder = monitor, mode, str(folder)
        self._module: Any = None
        self._fabric: Any = None
        self._best: tuple[float, Provenance] | None = None

    # --- what Fabric calls ------------------------------------------------------------------

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """A module was set up, in all processes."""
        if self._module is not None and not self._over:
            return  # another module of the same training
        self._module, self._best, self._fabric = bare(module.module), None, fabric
        self._spread = Spread(self._module, module._forward_module)  # noqa: SLF001 - has no getter
        training = Training(
            module=self._module,
            root=self._folder,
            roots=(self._folder,),
            address=lambda: active_or_own_run(self.settings.mlflow, self._folder),
            page=Path(self._folder),
            place=self._place(fabric),
            say=fabric.print,
        )
        self._begin(ExportRun(self.settings, training if fabric.is_global_zero else None))
        strategy = fabric.strategy
        if not isinstance(strategy.save_checkpoint, MirroredSave):
            strategy.save_checkpoint = MirroredSave(strategy.save_checkpoint)
        strategy.save_checkpoint.listeners[id(self)] = self

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        """A step was made, in all processes."""
        if self._module is None:
            return
        if self._spread.is_spread:  # for a trial all processes would put the weights together
            self._run.begin_batch(())
        else:
            self._run.step(lambda: self._weights(self._module.state_dict(), Provenance()))
        if self._fabric.world_size == 1:
            self._raise_failure()

    def on_train_end(self) -> None:
        """Training is over, and the user says so, in all processes."""
        if self._module is None:
            return
        needed = self._fabric.broadcast(self._run.needs_final_weights)
        state = self._spread.state(first=self._fabric.is_global_zero) if needed else {}
        self._end(final=(f"{self._folder}/model.ckpt", partial(self._weights, state, Provenance())))
        failure = self._run.take_failure()
        text = self._fabric.broadcast(None if failure is None else str(failure))
        if text is not None:  # a process that leaves alone leaves the others waiting
            raise failure if failure is not None else ExportError(text)

    on_fit_end = on_train_end

    def _end(self, **options: Any) -> None:
        best = None if self._best is None else self._best[1]
        if best is None or not os.path.lexists(str(best.checkpoint)):
            self._finish(**options)
        else:
            self._finish(best.checkpoint, stored=lambda: self._stored(best), **options)

    @override
    def _close(self) -> None:
        self._end()

    def on_exception(self, exception: BaseException) -> None:
        """Training was ended by an error, and the user says so."""
        self._fail()

    # --- checkpoints ------------------------------------------------------------------------

    def saving(self, path: str) -> None:
        """A checkpoint is about to be saved, in all processes."""
        if self._fabric.is_global_zero:
            self._look_for_removed()
            self._run.saving(path)

    def saved(self, path: str, content: Mapping[str, Any]) -> None:
        """A checkpoint was saved, in all processes."""
        first = self._fabric.is_global_zero
        if not self._spread.is_in(content):
            self._run.pass_over(path)
            return
        if not self._fabric.broadcast(first and self._wants(self._fabric, path)):
            return
        state = self._spread.state(content, first=first)
        if first:
            self._remember(path)
            weights = self._weights(state, self._origin(path, content))
            self._keep_best(weights)
            self._run.saved(path, lambda: weights)

    def _weights(self, state: Mapping[str, Any], origin: Provenance) -> Weights:
        return Weights(state=dict(state), origin=origin, whole=partial(self._spread.whole, state))

    def _stored(self, origin: Provenance) -> Weights:
        state = read_state_dict(Path(str(origin.checkpoint)), _WEIGHTS)
        return self._weights(state, origin)

    def _origin(self, path: str, content: Mapping[str, Any]) -> Provenance:
        numbers = {
            name: value
            for name, value in content.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        epoch = numbers.pop("epoch", None)
        steps = [numbers.pop(name, None) for name in _STEPS]
        step = next((int(each) for each in steps if each is not None), None)
        return Provenance(
            checkpoint=path,
            epoch=None if epoch is None else int(epoch),
            global_step=step,
            metrics={name: float(value) for name, value in numbers.items()},
            monitor=self._monitor,
            mode=self._mode,
        )

    def _keep_best(self, weights: Weights) -> None:
        """Remember the best checkpoint, without scores the last one; not its weights."""
        score = weights.origin.metrics.get(self._monitor or "", math.nan)
        if self._mode == "max":
            score = -score
        if self._best is None or math.isnan(self._best[0]) or score <= self._best[0]:
            self._best = score, weights.origin
