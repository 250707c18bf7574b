"""Watch which calls a method gets, on copies: no attribute of a module in training is replaced."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from onnxport.inputs.record import Recorder
from onnxport.tree import map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["MethodObserver"]

logger = logging.getLogger(__name__)

ENOUGH_CALLS = 3


class _Seen(BaseException):
    """Ends a rehearsal; no ``except Exception`` of the user's may catch it."""


class MethodObserver:
    """Records the calls of one method; see :class:`~onnxport.inputs.observe.Observer`.

    Args:
        owner: Name of the submodule that has the method.
        method: Name of the method.
    """

    def __init__(self, owner: str, method: str) -> None:
        self._owner = owner
        self._method = method
        self._name = f"{owner}.{method}" if owner else method
        self._recorder = Recorder()
        self.active = False

    @property
    def needs_rehearsal(self) -> bool:
        """Whether more calls are wanted."""
        return self.active and len(self._recorder.examples) < ENOUGH_CALLS

    @property
    def recorders(self) -> dict[str, Recorder]:
        """What was recorded."""
        return {self._name: self._recorder}

    def start(self) -> None:
        """Begin to watch."""
        self.active = True

    def stop(self) -> None:
        """Watch no more."""
        self.active = False

    def begin_batch(self, batch: Any) -> None:
        """Do nothing: data of any origin count."""

    def choose(self) -> str | None:
        """Return the method's name, if a call of it was seen."""
        return self._name if self._recorder.examples else None

    def rehearse(
        self,
        module: nn.Module,
        batch: Any,  # noqa: ARG002 - as Observer's
        step: Callable[[], Any],
        *,
        hurry: bool = False,
    ) -> None:
        """Run a step of a copy until the method was called and has returned.

        Args:
            module: The copy.
            batch: What the step gets.
            step: Runs a step of the copy; what it raises is of no interest.
            hurry: Do nothing, unless the step may be the method itself.
        """
        if hurry and not self._method.endswith("_step"):
            return
        owner = module.get_submodule(self._owner)
        original = getattr(owner, self._method)

        @functools.wraps(original)
        def recording(*args: Any, **kwargs: Any) -> Any:
            kept, kept_by_name = map_tensors(
                (args, kwargs), lambda tensor: tensor.clone(), fresh=True
            )
            original(*args, **kwargs)  # what it refuses is no call of it
            self._recorder.record(kept, kept_by_name, set())
            raise _Seen

        vars(owner)[self._method] = recording
        try:
            step()
        except _Seen:
            pass
        except Exception:
            logger.debug("A rehearsal was left.", exc_info=True)
