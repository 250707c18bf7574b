"""Run a step on a copy, where the calls of the step itself are compiled and cannot be seen."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["rehearsal"]


def rehearsal(name: str, trainer: Any, *indices: int) -> Callable[[Any, Any], Any]:
    """Return what runs a step of a copy of the module, with no effect outside of the copy.

    Args:
        name: ``"training_step"`` or ``"validation_step"``.
        trainer: The trainer; only the number of its optimizers is read.
        indices: Of the batch and, in validation, of the loader.
    """

    def step(module: Any, batch: Any) -> Any:
        optimizers = [_Nothing() for _ in trainer.optimizers]
        module.optimizers = lambda *_, **__: optimizers[0] if len(optimizers) == 1 else optimizers
        for method in ("manual_backward", "toggle_optimizer", "untoggle_optimizer"):
            setattr(module, method, _nothing)
        run = getattr(module, name)
        parameters = list(inspect.signature(run).parameters.values())
        if parameters and parameters[0].name == "dataloader_iter":
            return None  # it would take batches away from training
        several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        arguments = (batch, *indices)
        return run(*arguments[: None if several else len(parameters)])

    return step


class _Nothing:
    """Takes the place of an optimizer: every attribute and every call is again nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


def _nothing(*_: Any, **__: Any) -> None:
    """Take the place of a method that acts on the training run."""
