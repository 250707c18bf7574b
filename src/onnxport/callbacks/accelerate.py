"""The adapter for accelerate: ``OnnxExport().attach(accelerator)``, ``accelerator.save_state``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from onnxport.callbacks.adapter import LoopCallback, watch_steps
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.prepared import KeptCalls, about_to_go, prepared, remove_folder
from onnxport.callbacks.pretrained import companions_in, notes_of, numbers_of, without_autocast
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.scores import Scores
from onnxport.callbacks.seams import Seams
from onnxport.callbacks.training import Training, Weights, never_raises
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.tied import tied_names, with_tied
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["OnnxExport"]


class OnnxExport(LoopCallback):
    """Turns every checkpoint that ``accelerator.save_state`` writes into a proven ONNX model.

    Training is over with ``accelerator.end_training()`` or ``free_memory()``, else when Python
    ends. Metrics of a checkpoint are the numbers that ``accelerator.log`` got since the last step.

    Args:
        monitor: Name of the number that decides which checkpoint is best.
        mode: ``"min"`` or ``"max"`` for that number.
        options: As of :class:`onnxport.OnnxExport`, but ``validate_metrics``.

    Example:
        >>> from onnxport.callbacks.accelerate import OnnxExport
        >>> OnnxExport(monitor="val_loss").reports
        []
    """

    def __init__(
        self, *, monitor: str | None = None, mode: Literal["min", "max"] = "min", **options: Any
    ) -> None:
        super().__init__(**options)
        self._monitor, self._mode = monitor, mode

    def attach(self, accelerator: Any, model: nn.Module | None = None, step: int = 0) -> OnnxExport:
        """Follow an accelerator, in all processes; after ``prepare`` and ``init_trackers``.

        Args:
            accelerator: The ``Accelerator``.
            model: What is exported; default: the one module that was prepared.
            step: Steps of the optimizer that were made before, where training goes on.

        Returns:
            This callback.

        Raises:
            ConfigurationError: If the module is not clear, or processes have parts of it.
        """
        self._close()  # another training, of which nobody has said that it is over
        self._number, wrapped, self._module = prepared(accelerator, model)
        self._accelerator, self._root = accelerator, str(accelerator.project_dir or ".")
        self._scores = Scores(self._monitor, self._mode)
        self._metrics: tuple[int, dict[str, float]] = -1, {}
        self._steps, self._seen, self._pickled = step, 0, False
        self._call = KeptCalls(wrapped, self._module)
        training = Training(
            module=self._module,
            root=self._root,
            roots=(self._root,),
            address=lambda: active_or_own_run(self.settings.mlflow, self._root),
            page=Path(self._root),
            goes_on=step > 0 or accelerator.save_iteration > 0,
            place=self._place(accelerator, f"model {self._number}"),
            fallback=self._call.example,
            say=accelerator.print,
        )
        self._begin(ExportRun(self.settings, training if accelerator.is_main_process else None))
        self._steps_watched = watch_steps(wrapped, self._on_step)
        self._hook = accelerator.register_save_state_pre_hook(self._saving)
        self._seams = Seams(accelerator)
        self._seams.wrap("save_state", before=self._before_save, after=self._saved)
        self._seams.wrap("log", after=lambda _, values, *__, **___: self._log(values))
        self._seams.wrap("end_training", before=self._close)
        self._seams.wrap("free_memory", before=lambda *_, **__: self._close())
        return self

    # --- what accelerate does ---------------------------------------------------------------

    def _on_step(self) -> None:
        self._seen += 1
        self._steps += bool(self._accelerator.sync_gradients)
        with without_autocast(self._module):
            self._run.step(self._weights)

    def _log(self, values: Mapping[str, Any]) -> None:
        with never_raises("reading what is logged"):
            seen, known = self._metrics
            self._metrics = self._seen, (known if seen == self._seen else {}) | numbers_of(values)

    def _before_save(self, _: Any = None, safe_serialization: bool = True, **__: Any) -> None:
        """Remove what accelerate is about to remove: it fails if our files change meanwhile."""
        self._pickled = not safe_serialization
        with never_raises("the removal of checkpoints"):
            for checkpoint in about_to_go(self._accelerator, self._saved_paths):
                self._run.removing(checkpoint)
                remove_folder(Path(checkpoint).parent)
            self._look_for_removed()

    def _saving(self, _: Any, __: Any, folder: str) -> None:
        self._run.saving(self._checkpoint(folder))

    def _saved(self, folder: Any, *_: Any, **__: Any) -> None:
        if not self._run.is_active:
            return
        with never_raises(f"the save of {folder}"), without_autocast(self._module):
            self._look_for_removed()
            checkpoint = self._checkpoint(str(folder))
            self._remember(checkpoint)
            origin = self._origin(checkpoint)
            self._scores.add(origin)
            if self._wants(self._accelerator, checkpoint):
                self._run.saved(checkpoint, lambda: self._weights(origin))
        if self._accelerator.num_processes == 1:
            self._raise_failure()

    @override
    def _close(self) -> None:
        if self._over:
            return
        self._let_go()
        self._look_for_removed()
        best = self._scores.best
        with without_autocast(self._module):
            self._finish(
                None if best is None else best.checkpoint,
                stored=None if best is None else partial(self._stored, best),
                final=(f"{self._root}/model.safetensors", self._weights) if self._steps else None,
            )
        if self._accelerator.num_processes == 1:
            self._raise_failure()

    @override
    def _fail(self) -> None:
        if not self._over:
            self._let_go()
        super()._fail()

    def _let_go(self) -> None:
        """Nothing of the accelerator's leads here any more: it may want its memory."""
        self._seams.let_go()
        for handle in (self._steps_watched, self._hook, self._call):
            handle.remove()

    @override
    def _is_there(self, checkpoint: str) -> bool:
        return Path(checkpoint).parent.is_dir()  # a hook may save the weights elsewhere in it

    # --- weights ----------------------------------------------------------------------------

    def _checkpoint(self, folder: str) -> str:
        """Return the file of the module's weights."""
        number = f"_{self._number}" if self._number else ""
        name = f"pytorch_model{number}.bin" if self._pickled else f"model{number}.safetensors"
        return str(Path(folder, name))

    def _weights(self, origin: Provenance | None = None) -> Weights:
        state = dict(self._module.state_dict())
        return Weights(state=state, origin=origin or self._origin(None))

    def _stored(self, origin: Provenance) -> Weights:
        state = read_state_dict(Path(str(origin.checkpoint)), "")
        return Weights(state=with_tied(state, tied_names(self._module)), origin=origin)

    def _origin(self, checkpoint: str | None) -> Provenance:
        seen, metrics = self._metrics
        return Provenance(
            checkpoint=checkpoint,
            global_step=self._steps,
            metrics=metrics if seen == self._seen else {},
            monitor=self._monitor,
            mode=self._mode,
            notes=notes_of(self._module),
            beside=[] if checkpoint is None else companions_in(Path(checkpoint).parent),
        )
