"""Run a step on a copy, where the calls of the step itself are compiled and cannot be seen."""

from __future__ import annotations

import inspect
import logging
import operator
from functools import partial
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.lightning.sharded import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["rehearsal", "rehearsals"]

logger = logging.getLogger(__name__)


def rehearsals(
    name: str, trainer: Any, *indices: int
) -> Callable[[Any], Callable[[Any, Any], Any] | None]:
    """Return what gives for a target what runs the step, see :func:`rehearsal`, or ``None``."""

    def rehearse(target: Any) -> Callable[[Any, Any], Any] | None:
        if is_sharded(trainer.strategy):  # a copy of a part cannot run a step
            return None
        return rehearsal(name, trainer, *indices, method=target)

    return rehearse


def rehearsal(
    name: str, trainer: Any, *indices: int, method: object = None
) -> Callable[[Any, Any], Any]:
    """Return what runs a step of a copy of the module, with no effect outside of the copy.

    Args:
        name: ``"training_step"`` or ``"validation_step"``.
        trainer: The trainer; only the numbers of its optimizers and processes are read.
        indices: Of the batch and, in validation, of the loader.
        method: If it is the name of a step that training does not run, this is run afterwards with
            the batch, or with the first part of it, as the trainer would in prediction.
    """

    def step(module: Any, batch: Any) -> Any:
        optimizers = [_Nothing() for _ in trainer.optimizers]
        module.optimizers = lambda *_, **__: optimizers[0] if len(optimizers) == 1 else optimizers
        for acting in ("manual_backward", "toggle_optimizer", "untoggle_optimizer"):
            setattr(module, acting, _nothing)
        run = getattr(module, name)
        parameters = list(inspect.signature(run).parameters.values())
        if parameters and parameters[0].name == "dataloader_iter":
            return None  # it would take batches away from training
        several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        arguments = (batch, *indices)
        return run(*arguments[: None if several else len(parameters)])

    if not isinstance(method, str) or not method.endswith("_step"):
        return step

    def steps(module: Any, batch: Any) -> None:
        if trainer.world_size == 1:  # another process would not rehearse, and a step may wait
            _quietly(step, module, batch)
        inputs = batch[:1] if isinstance(batch, (tuple, list)) else ()
        for given in (batch, *inputs):
            _quietly(partial(_run_alone, method), module, given)

    return steps


def _run_alone(method: str, module: Any, batch: Any) -> None:
    """Call a step as for the first batch: indices that differ would be constants that differ."""
    run = operator.attrgetter(method)(module)
    parameters = list(inspect.signature(run).parameters.values())
    names = {each.name for each in parameters}
    indices = {name: 0 for name in ("batch_idx", "dataloader_idx") if name in names}
    run(batch, **indices)


def _quietly(step: Callable[[Any, Any], Any], module: Any, batch: Any) -> None:
    try:
        step(module, batch)
    except Exception:
        logger.debug("A step could not be rehearsed.", exc_info=True)


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
