"""Every checkpoint of a Runner gets a proven ONNX model.

A newcomer has written it from docs/adapters.md alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.toy_framework import Plugin, Runner

from onnxport.callbacks.adapter import LoopCallback, bare, is_first_process, weights_of
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.training import Training, Weights, never_raises
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.report import Provenance

if TYPE_CHECKING:
    from torch import nn

__all__ = ["OnnxExport"]


class OnnxExport(LoopCallback, Plugin):
    """Writes a proven ONNX model beside every checkpoint, and removes it with its checkpoint.

    Its options are those of the other adapters of onnxport.
    """

    _module: nn.Module
    _last: Provenance | None = None  # of the newest checkpoint that is still there

    def opened(self, runner: Runner) -> None:
        """Training begins, or goes on where the runner has trained before."""
        self._module, self._last = bare(runner.module), None
        folder = Path(runner.folder)
        training = Training(
            module=self._module,
            root=str(folder),
            roots=(str(folder),),
            address=lambda: active_or_own_run(self.settings.mlflow, str(folder)),
            page=folder,
            say=print,
            goes_on=runner.step > 0,
        )
        self._begin(ExportRun(self.settings, training if is_first_process() else None))

    def before_step(self, runner: Runner, batch: Any) -> None:
        """The next step's calls are watched; the place for the error of a failed export."""
        self._run.step(lambda: self._current(runner))
        self._raise_failure()

    def before_write(self, runner: Runner, file: Path) -> None:
        """A model of that name is no longer true."""
        self._run.saving(str(file))

    def after_write(self, runner: Runner, file: Path, content: dict[str, Any]) -> None:
        """The checkpoint gets its model. An error waits for the next step: the runner is busy."""
        self._last = origin = self._origin(runner, file)
        if not self._wants(runner, str(file)):
            return
        with never_raises("looking for the weights in a checkpoint"):
            state = weights_of(content, self._module)
            if state is None:
                self._run.refused("The checkpoint has no weights of the module.", origin)
                self._run.pass_over(str(file))
            else:
                self._run.saved(str(file), lambda: Weights(state=state, origin=origin))

    def before_delete(self, runner: Runner, file: Path) -> None:
        """The model of the checkpoint is about to lose it."""
        if self._last is not None and self._last.checkpoint == str(file):
            self._last = None
        self._run.removing(str(file))

    def after_delete(self, runner: Runner, file: Path) -> None:
        """The model goes with its checkpoint."""
        self._run.removed(str(file))

    def closed(self, runner: Runner, error: BaseException | None) -> None:
        """Training is over: wait for the models. An error of the training stays the one raised."""
        if error is not None:
            self._fail()
            return
        best = None if self._last is None else self._last.checkpoint
        self._finish(
            best,
            stored=lambda: self._stored(best, self._last),
            final=(str(Path(runner.folder, "model.pth")), lambda: self._current(runner)),
        )
        self._raise_failure()

    def _stored(self, file: str | None, origin: Provenance | None) -> Weights:
        """The weights in the file of a checkpoint, without the prefixes of wrappers.

        Raises:
            ValueError: If there are none.
        """
        if file is None or origin is None:
            raise ValueError("There is no checkpoint.")
        state = weights_of(read_state_dict(Path(file), "network"), self._module)
        if state is None:
            raise ValueError("The checkpoint has no weights of the module.")
        return Weights(state=state, origin=origin)

    def _current(self, runner: Runner) -> Weights:
        """The weights the module has now, which are in no checkpoint."""
        return Weights(state=dict(self._module.state_dict()), origin=self._origin(runner, None))

    def _origin(self, runner: Runner, file: Path | None) -> Provenance:
        """Where weights come from; scores are metrics."""
        return Provenance(
            checkpoint=None if file is None else str(file),
            global_step=runner.step,
            metrics=dict(runner.scores),
        )
