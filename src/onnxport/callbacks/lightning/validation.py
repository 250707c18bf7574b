"""The module's own validation on batches that were kept: with any copy of the module, anywhere."""

from __future__ import annotations

import importlib
import random
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnxport.callbacks.batches import KeptBatches, read_batches
from onnxport.callbacks.lightning.examples import is_own, silent
from onnxport.errors import ExportError
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.module_state import unsilence
from onnxport.pipeline import Validation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from onnxport.config import Metrics

__all__ = ["ModuleValidation", "ValidationWatch"]


@dataclass(frozen=True, slots=True)
class ModuleValidation:
    """Runs ``Trainer.validate`` on a copy of a module.

    Args:
        framework: The Lightning that the module is of.
        counts: How many batches each loader has.
        problem: Why there are none, or ``""``.
    """

    framework: str
    counts: tuple[int, ...]
    problem: str = ""

    def __call__(self, module: nn.Module, batches: int) -> dict[str, float]:
        """Return what the module logs, by name.

        Args:
            module: A copy that belongs to the caller, on the CPU.
            batches: Descriptor of the file of batches.

        Raises:
            ExportError: If the batches could not be kept.
            Exception: Whatever the module's steps and hooks raise.
        """
        if self.problem:
            raise ExportError(self.problem)
        lightning = importlib.import_module(self.framework)
        _let_batches_be(module)
        _reset_metrics(module)
        unsilence(module)
        loaders = [_Loader(batches, place, count) for place, count in enumerate(self.counts)]
        with (
            preserved_globals(),
            tempfile.TemporaryDirectory(prefix="onnxport-") as folder,
            silent(self.framework),
        ):
            _seed()
            logged: dict[str, Any] = {}
            trainer = _trainer(lightning, folder, logged)
            trainer.validate(module, loaders if len(loaders) > 1 else loaders[0], verbose=False)
        return {name: float(value) for name, value in logged.items() if value.numel() == 1}


class ValidationWatch:
    """Keeps the batches of the first validation run of a fit.

    Args:
        options: How many are wanted.
        framework: The Lightning of the run.
    """

    def __init__(self, options: Metrics, framework: str) -> None:
        self._options = options
        self._framework = framework
        self._kept: KeptBatches | None = None
        self._counts: tuple[int, ...] = ()
        self._done = False
        self._checkpoints = 0

    def begin(self, loaders: int) -> None:
        """A validation run begins.

        Args:
            loaders: How many loaders it has.
        """
        if not self._done:
            self._kept, self._counts = KeptBatches(self._options.batches), (0,) * loaders

    def batch(self, batch: Any, loader: int) -> None:
        """A batch is about to be validated."""
        if self._kept is not None and not self._done:
            self._kept.add(batch, loader)

    def end(self) -> None:
        """A validation run is over: its batches are what models are validated with."""
        if self._kept is not None and not self._done:
            counts = self._kept.counts
            self._counts = tuple(counts[place] for place in range(len(self._counts)))
            self._done = bool(counts) or bool(self._kept.problem)

    def next(self) -> Validation | None:
        """Return what the model of the next checkpoint is validated with; ``None``: with nothing.

        There are no batches before the first validation run is over, and not each checkpoint may be
        wanted.
        """
        if self._kept is None or not self._done:
            return None
        self._checkpoints += 1
        if (self._checkpoints - 1) % self._options.every_n_checkpoints:
            return None
        run = ModuleValidation(self._framework, self._counts, self._kept.problem)
        return Validation(run, self._kept, sum(self._counts))


class _Loader:
    """Batches of one loader."""

    def __init__(self, descriptor: int, place: int, count: int) -> None:
        self._descriptor, self._place, self._count = descriptor, place, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return read_batches(self._descriptor, self._place)


def _trainer(lightning: Any, folder: str, logged: dict[str, Any]) -> Any:
    """Return a trainer that logs nowhere but here, writes nothing and asks no cluster."""

    class Reads(lightning.Callback):  # type: ignore[misc]
        def on_validation_end(self, trainer: Any, _: Any) -> None:
            logged.update(trainer.callback_metrics)  # of which nothing is left later

    loggers = importlib.import_module(f"{lightning.__name__}.loggers.logger")
    plugins = importlib.import_module(f"{lightning.__name__}.plugins.environments")
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=loggers.DummyLogger(),
        callbacks=[Reads()],
        plugins=[plugins.LightningEnvironment()],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _let_batches_be(module: Any) -> None:
    """The batches were moved and changed already, and the module was set up before training."""
    module.on_before_batch_transfer = module.on_after_batch_transfer = _same
    module.transfer_batch_to_device = lambda batch, device, dataloader_idx: batch  # noqa: ARG005 - as Lightning calls it
    module.configure_callbacks = list
    for hook in ("prepare_data", "setup", "teardown", "configure_model", "configure_sharded_model"):
        if is_own(module, hook):  # a trainer refuses a module that has both of the last two
            setattr(module, hook, _nothing)


def _reset_metrics(module: Any) -> None:
    """Metrics as of ``torchmetrics`` have seen batches of the run that the module is a copy of."""
    for part in module.modules():
        if any(kind.__module__.startswith("torchmetrics") for kind in type(part).__mro__):
            reset = getattr(part, "reset", None)
            if callable(reset):
                reset()
        if hasattr(part, "_metric_attributes"):  # ids of the metrics of the original
            part._metric_attributes = None  # noqa: SLF001 - has no public name


def _seed() -> None:
    """A step that draws random numbers draws the same with PyTorch and with the model."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the stream that user code draws from
    torch.manual_seed(0)


def _same(batch: Any, _: int) -> Any:
    return batch


def _nothing(*_: Any, **__: Any) -> None:
    """Take the place of a hook."""
