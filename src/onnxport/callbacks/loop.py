"""The adapter for a loop that somebody has written: ``with Exporter(model) as exporter``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from onnxport.callbacks.adapter import LoopCallback, bare, is_first_process, watch_steps, weights_of
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.scores import Scores
from onnxport.callbacks.training import Training, Weights
from onnxport.errors import ConfigurationError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.report import Provenance

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType

    from torch import nn

__all__ = ["Exporter"]


class Exporter(LoopCallback):
    """Turns every checkpoint of a loop of your own into a proven ONNX model.

    Args:
        model: The module in training, with or without what PyTorch wraps around it.
        folder: Of the run: its page, and its models where there is no checkpoint.
        monitor: Name of the metric that decides which checkpoint is best: of those that
            :meth:`save` gets.
        mode: ``"min"`` or ``"max"`` for that metric.
        goes_on: The loop goes on from a checkpoint: so does the page of the run.
        options: As of :class:`onnxport.OnnxExport`, but ``validate_metrics``.

    Raises:
        ConfigurationError: If an argument is wrong.

    Example:
        >>> import tempfile, torch
        >>> from onnxport.callbacks.loop import Exporter
        >>> network = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(network.parameters(), 0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Exporter(network, folder, background=False, console=False) as exporter:
        ...         for step in range(4):
        ...             network(torch.randn(8, 4)).square().mean().backward()
        ...             optimizer.step()
        ...         exporter.save(f"{folder}/last.pt", step=4)
        >>> [report.ok for report in exporter.reports]
        [True]
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] = ".",
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        goes_on: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._model, self._folder, self._goes_on = bare(model), str(folder), goes_on
        self._monitor, self._mode = monitor, mode
        self._step = 0
        self._scores = Scores(monitor, mode)

    def __enter__(self) -> Self:
        training = Training(
            module=self._model,
            root=self._folder,
            roots=(self._folder,),
            address=lambda: active_or_own_run(self.settings.mlflow, self._folder),
            page=Path(self._folder),
            goes_on=self._goes_on,
            say=print,
        )
        self._begin(ExportRun(self.settings, training if is_first_process() else None))
        self._watched = watch_steps(self._model, self._on_step)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watched.remove()
        if error is not None:
            self._fail()
            return
        best = self._scores.best
        self._finish(
            None if best is None else best.checkpoint,
            stored=None if best is None else partial(self._stored, best),
            final=(f"{self._folder}/model.pt", self._weights),
        )
        self._raise_failure()

    def save(
        self,
        path: str | os.PathLike[str],
        content: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Save a checkpoint with ``torch.save``, and make its model, now or soon.

        Args:
            path: Of the checkpoint.
            content: What it holds, the weights among it: as they are when they are not the live
                ones (averaged, say). Default: ``{"state_dict": ..., "epoch": ..., "global_step":
                ...}``.
            metrics: Measured with these weights.
            step: Steps of the optimizer; default: calls of the module in training.
            epoch: The epoch.

        Raises:
            ConfigurationError: If the content holds no weights of the model.
            ExportError: If a model failed, with ``on_error="raise"``.
        """
        if not is_first_process():
            return
        checkpoint, step = str(path), self._step if step is None else step
        if content is None:
            content = {"state_dict": self._model.state_dict(), "epoch": epoch, "global_step": step}
        state = weights_of(content, self._model)
        if state is None:
            raise ConfigurationError(
                f"What is saved to {checkpoint} holds no weights of the model: {list(content)}. "
                "Put model.state_dict() into it."
            )
        found = {name: float(value) for name, value in (metrics or {}).items()}
        self._look_for_removed()
        self._run.saving(checkpoint)
        torch.save(content, checkpoint)
        self._remember(checkpoint)
        origin = Provenance(
            checkpoint=checkpoint,
            epoch=epoch,
            global_step=step,
            metrics=found,
            monitor=self._monitor,
            mode=self._mode,
        )
        self._scores.add(origin)
        if self._wants(self, checkpoint):
            self._run.saved(checkpoint, lambda: Weights(state=state, origin=origin))
        self._raise_failure()

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint and its model.

        Args:
            path: Of the checkpoint.
        """
        if is_first_process():
            self._run.removing(str(path))
            Path(path).unlink(missing_ok=True)
            self._look_for_removed()

    def _on_step(self) -> None:
        self._step += 1
        self._run.step(self._weights)

    def _weights(self) -> Weights:
        origin = Provenance(global_step=self._step, monitor=self._monitor, mode=self._mode)
        return Weights(state=dict(self._model.state_dict()), origin=origin)

    def _stored(self, origin: Provenance) -> Weights:
        """Read a checkpoint of this loop."""
        return Weights(state=read_state_dict(Path(str(origin.checkpoint))), origin=origin)
