"""What adapters share whose framework tells little: steps, processes, checkpoints that are gone."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from onnxport._torch_compat import unwrapped
from onnxport.callbacks.place import claimed_place, give_back
from onnxport.callbacks.run import SAME_NAMES
from onnxport.callbacks.settings import ExportCallback
from onnxport.errors import ConfigurationError
from onnxport.exporter.checkpoint_file import weights_in
from onnxport.inputs.observe import quiet_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from onnxport.callbacks.run import ExportRun

__all__ = ["LoopCallback", "bare", "is_first_process", "watch_steps", "weights_of"]


class LoopCallback(ExportCallback):
    """A callback that is not told of everything: it looks after itself.

    Nobody may say that training is over: then it is when the next one begins, or when Python ends.

    Raises:
        ConfigurationError: If an argument is wrong.
    """

    @override
    def _reset(self) -> None:
        if self.settings.options.metrics is not None:
            raise ConfigurationError(
                "validate_metrics= repeats a LightningModule's own validation_step, and there is "
                "none here. Leave it out; metrics that you save with a checkpoint decide."
            )
        self._saved_paths: dict[str, None] = {}
        self._claimed_of: Any = None
        self._over = True

    def _place(self, training: Any, where: str = "") -> str | None:
        """Return what follows the names of the models; ``None``: another callback has them.

        Args:
            training: What all callbacks of the training, and of no other one, can see: a trainer.
            where: Those of one place alone have the same names: a folder, say.

        Raises:
            ConfigurationError: With ``on_error="raise"``, if another callback has them.
        """
        place, self._claimed_of = claimed_place(self, training, where), training
        if place is None and self.settings.on_error == "raise":
            raise ConfigurationError(SAME_NAMES)
        return place

    @override
    def _begin(self, run: ExportRun) -> None:
        if not self._over:
            self._run.fail()
        super()._begin(run)
        self._over = False
        atexit.register(_end, weakref.ref(self), os.getpid())

    def _finish(self, best: str | None = None, **options: Any) -> None:
        """Training is over: see :meth:`ExportRun.finish`."""
        if not self._over:
            self._release()
            self._run.finish(best, **options)

    def _close(self) -> None:
        """Training is over, and nobody has said so."""
        self._finish()

    def _fail(self) -> None:
        """Training is over by an error."""
        if not self._over:
            self._release()
            self._run.fail()

    def _release(self) -> None:
        """Others may have the names of our models."""
        self._over = True
        if self._claimed_of is not None:
            give_back(self, self._claimed_of)
            self._claimed_of = None

    def _wants(self, trainer: Any, checkpoint: str) -> bool:
        return self._run.wants(checkpoint, lambda: self.should_export(trainer, checkpoint))

    def _raise_failure(self) -> None:
        """Raise what should end training, if anything should.

        Raises:
            ExportError: With ``on_error="raise"``, or ``preflight="raise"``.
        """
        failure = self._run.take_failure()
        if failure is not None:
            raise failure

    def _remember(self, checkpoint: str) -> None:
        self._saved_paths[checkpoint] = None

    def _is_there(self, checkpoint: str) -> bool:
        """Tell whether a checkpoint has not been removed."""
        return os.path.lexists(checkpoint)

    def _look_for_removed(self) -> None:
        """Remove the models of checkpoints that somebody has removed."""
        for checkpoint in [path for path in self._saved_paths if not self._is_there(path)]:
            del self._saved_paths[checkpoint]
            self._run.removing(checkpoint)
            self._run.removed(checkpoint)


def _end(reference: weakref.ref[LoopCallback], process: int) -> None:
    """Python ends: by an error of the user's, or because all is done."""
    callback = reference()
    if callback is None or os.getpid() != process:  # a process that was forked has no training
        return
    if getattr(sys, "last_value", None) is not None:
        callback._fail()  # noqa: SLF001 - of this module
    else:
        callback._close()  # noqa: SLF001


def bare(module: Any) -> nn.Module:
    """Take a module out of what PyTorch has put around it for several processes, or compiled."""
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while True:
        inner = module.module if isinstance(module, parallel) else unwrapped(module)
        if inner is module:
            break
        module = inner
    found: nn.Module = module
    return found


def is_first_process() -> bool:
    """Tell whether this process is alone, or the first of its group."""
    distributed = torch.distributed
    grouped = distributed.is_available() and distributed.is_initialized()
    return not grouped or distributed.get_rank() == 0


def weights_of(content: Any, module: nn.Module) -> Mapping[str, Any] | None:
    """Find the weights of a module in what somebody saves; ``None``: they are not in it.

    Args:
        content: What is saved: a ``state_dict``, or a mapping that holds one, or the module.
        module: The module, without wrappers.
    """
    names = set(module.state_dict())
    try:
        places = [content, *content.values()] if hasattr(content, "values") else [content]
        for place in places:
            if isinstance(place, torch.nn.Module) and bare(place) is module:
                return module.state_dict()
            if not hasattr(place, "keys") or not names:
                continue
            for named in (place, _plainly_named(place)):  # a part may really be called "module"
                if names <= set(named):
                    return {name: value for name, value in named.items() if name in names}
        return _plainly_named(weights_in(content))
    except (KeyError, TypeError, AttributeError):
        return None


def _plainly_named(state: Any) -> dict[str, Any]:
    return {_plain_name(name): value for name, value in state.items() if isinstance(name, str)}


def _plain_name(name: str) -> str:
    """Return a tensor's name without what wrappers have put before it."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def watch_steps(module: nn.Module, on_step: Callable[[], None]) -> RemovableHandle:
    """Call a function after each call of a module in training.

    Args:
        module: The module.
        on_step: The function; must not raise.
    """

    def after(called: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or called is not module:  # a copy takes the hook along
            return
        if called.training and torch.is_grad_enabled():
            on_step()

    return module.register_forward_hook(quiet_hook(after))
