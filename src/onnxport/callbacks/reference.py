"""What the module in training computes with a checkpoint's weights."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from onnxport._torch_compat import plain_name
from onnxport.exporter.hooks import plain_hooks
from onnxport.exporter.module_state import run_borrowed
from onnxport.exporter.target import find_target
from onnxport.pipeline import LiveReference
from onnxport.tree import flatten, map_tensors, same_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import nn

    from onnxport.tree import Example

__all__ = ["Reference"]

logger = logging.getLogger(__name__)


class Reference:
    """Runs the live module once per checkpoint, and at the first tells which hooks are idle.

    A user's hook that watches (it records a statistic, say) would be called by every run of the
    copy, too, with tensors that training never had. Where it makes no difference to the result the
    copy does without it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[Any]] = {}
        self._writes = False

    def run(
        self,
        live: nn.Module,
        target: str,
        examples: tuple[Example, ...],
        state: Mapping[str, Any],
    ) -> tuple[LiveReference | None, list[Any]]:
        """Run the first example with a checkpoint's weights.

        Args:
            live: The live module, or what stands for it.
            target: Name of the submodule or method to run.
            examples: Calls of it.
            state: The checkpoint's ``state_dict``.

        Returns:
            The outcome, ``None`` if there is nothing to run; and the hooks that are idle.
        """
        if not examples or not flatten((examples[0].args, dict(examples[0].kwargs)))[1]:
            return None, []
        module = find_target(live, target)
        device = next(
            (tensor.device for tensor in (*module.parameters(), *module.buffers())),
            torch.device("cpu"),
        )
        example = examples[0]
        call = map_tensors(
            (example.args, dict(example.kwargs)),
            lambda tensor: tensor.to(device, copy=True),
            fresh=True,
        )
        outputs = _flat(self._run(live, state, call, target))
        reference = LiveReference(
            example=example,
            outputs=outputs,
            # Another device rounds differently, and may use TF32.
            rtol=1e-4 if device.type == "cpu" else 2e-2,
            target=plain_name(target),
            exact=device.type == "cpu",
        )
        hooks = plain_hooks(module)
        key = tuple(map(id, hooks))
        if hooks and key not in self._known:
            idle = _are_idle(partial(run_borrowed, live, state, target=target), _clone(call), hooks)
            self._known[key] = hooks if idle else []
        return reference, self._known.get(key, [])

    def _run(self, live: nn.Module, state: Mapping[str, Any], call: Any, target: str) -> Any:
        """Run without copies of the weights, as long as the module never writes to one."""
        if not self._writes:
            try:
                return run_borrowed(live, state, *_clone(call), target=target, copies=False)
            except Exception:  # user code, which may catch and raise what it likes
                logger.debug("The reference runs on copies of the weights.", exc_info=True)
                self._writes = True
        return run_borrowed(live, state, *call, target=target)


def _are_idle(run: Callable[..., Any], call: Any, hooks: Collection[Any]) -> bool:
    """Compare runs with and without hooks.

    Without comes first, and on values that no hook has seen: one that keeps a tensor for
    ``forward`` to read later is told by what it has kept of another call.
    """
    other = map_tensors(call, _other_values, fresh=True)
    if all(torch.equal(a, b) for a, b in zip(_flat(call), _flat(other), strict=True)):
        return False
    try:
        without = run(*_clone(other), without=hooks)
        within = run(*_clone(other))
        pairs = zip(_flat(without), _flat(within), strict=True)
        return same_structure(flatten(without)[0], flatten(within)[0]) and all(
            _same(a, b) for a, b in pairs
        )
    except Exception:
        logger.debug("The hooks stay on the copy.", exc_info=True)
        return False


def _clone(tree: Any) -> Any:
    return map_tensors(tree, torch.clone, fresh=True)


def _flat(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().cpu() for _, tensor in flatten(tree)[1])


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _other_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return values that are allowed where these are: rows reversed, and numbers scaled."""
    if tensor.layout is not torch.strided:
        return tensor.clone()
    tensor = tensor.flip(0) if tensor.ndim else tensor.clone()
    return tensor * -0.5 if tensor.is_floating_point() else tensor
