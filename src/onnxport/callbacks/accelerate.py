"""The adapter for accelerate: ``OnnxExport().attach(accelerator)``, ``accelerator.save_state``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from onnxport.callbacks.adapter import LoopCallback, bare, watch_steps
from onnxport.callbacks.address import active_or_own_run
from onnxport.callbacks.mirrored_saver import first, then
from onnxport.callbacks.pretrained import companions_in, notes_of, numbers_of, without_autocast
from onnxport.callbacks.run import ExportRun
from onnxport.callbacks.scores import Scores
from onnxport.callbacks.spread import IN_PARTS
from onnxport.callbacks.training import Training, Weights, never_raises
from onnxport.errors import ConfigurationError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.tied import tied_names, with_tied
from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["OnnxExport"]

_ELSEWHERE = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
"""What saves weights by itself, in parts."""


class OnnxExport(LoopCallback):
    """Turns every checkpoint that ``accelerator.save_state`` writes into a proven ONNX model.

    Training is over with ``accelerator.end_training()``, else when Python ends. Metrics of a
    checkpoint are the numbers that ``accelerator.log`` got since the last step.

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

    def attach(self, accelerator: Any, model: nn.Module | None = None) -> OnnxExport:
        """Follow an accelerator, in all processes; after ``prepare`` and ``init_trackers``.

        Args:
            accelerator: The ``Accelerator``.
            model: What is exported; default: the one module that was prepared.

        Returns:
            This callback.

        Raises:
            ConfigurationError: If the module is not clear, or processes save parts of it.
        """
        self._place_in_files, self._module = _prepared(accelerator, model)
        self._accelerator, self._root = accelerator, str(accelerator.project_dir or ".")
        self._scores = Scores(self._monitor, self._mode)
        self._steps = self._seen = 0
        self._metrics: tuple[int, dict[str, float]] = -1, {}
        training = Training(
            module=self._module,
            root=self._root,
            roots=(self._root,),
            address=lambda: active_or_own_run(self.settings.mlflow, self._root),
            page=Path(self._root),
            goes_on=accelerator.save_iteration > 0,
            place=self._place(accelerator),
            say=accelerator.print,
        )
        self._begin(ExportRun(self.settings, training if accelerator.is_main_process else None))
        self._watched = watch_steps(self._module, self._on_step)
        accelerator.register_save_state_pre_hook(self._saving)
        accelerator.save_state = then(accelerator.save_state, self._saved)
        accelerator.log = then(accelerator.log, lambda _, values, *__, **___: self._log(values))
        accelerator.end_training = first(accelerator.end_training, self._close)
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
            known = known if seen == self._seen else {}
            self._metrics = self._seen, known | numbers_of(values)

    def _saving(self, _: Any, __: Any, folder: str) -> None:
        self._run.saving(self._checkpoint(folder))

    def _saved(self, folder: Any, *_: Any, **__: Any) -> None:
        if self._over or not self._run.is_active:
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
        self._watched.remove()
        self._look_for_removed()
        best = self._scores.best
        with without_autocast(self._module):
            self._finish(
                None if best is None else best.checkpoint,
                stored=None if best is None else partial(self._stored, best),
                final=(f"{self._root}/model.safetensors", self._weights),
            )
        if self._accelerator.num_processes == 1:
            self._raise_failure()

    # --- weights ----------------------------------------------------------------------------

    def _checkpoint(self, folder: str) -> str:
        """Return the file of the module's weights, one of two."""
        suffix = f"_{self._place_in_files}" if self._place_in_files else ""
        pickled = Path(folder, f"pytorch_model{suffix}.bin")
        return str(pickled if pickled.exists() else Path(folder, f"model{suffix}.safetensors"))

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


def _prepared(accelerator: Any, model: nn.Module | None) -> tuple[int, nn.Module]:
    """Return the place of a module among those that were prepared, and the module.

    Raises:
        ConfigurationError: If it is not clear, or processes save parts of it.
    """
    if accelerator.distributed_type.name in _ELSEWHERE:
        raise ConfigurationError(
            f"{accelerator.distributed_type} saves weights in parts. {IN_PARTS}"
        )
    modules = [bare(each) for each in accelerator._models]  # noqa: SLF001 - has no getter
    if model is None and len(modules) == 1:
        return 0, modules[0]
    if model is None or bare(model) not in modules:
        raise ConfigurationError(
            f"Which module is exported? {len(modules)} were prepared. Give attach(accelerator, "
            "model) one of them, after accelerator.prepare."
        )
    return modules.index(bare(model)), bare(model)
