"""Watch which calls a module really gets in training and validation."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport.tree import Example, flatten, map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle

__all__ = ["Observer", "Recorder"]

logger = logging.getLogger(__name__)

MAX_SIGNATURES = 4
"""Distinct shape signatures kept per module."""
MAX_BYTES = 64 * 2**20
"""Calls larger than this are cut to :data:`KEPT_ROWS` rows."""
KEPT_ROWS = 16


class Recorder:
    """Keeps a few calls of one module, one per distinct shape signature, on the CPU.

    Attributes:
        examples: The calls kept so far.
        touched_batch: Whether the first call got a tensor of the batch itself.
    """

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.touched_batch = False
        self._seen: set[tuple[Any, ...]] = set()

    @property
    def full(self) -> bool:
        """Whether enough was seen."""
        return len(self.examples) >= MAX_SIGNATURES

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: set[int]) -> None:
        """Keep a call if its shapes are new.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            batch: Addresses of the storages of the batch's tensors.
        """
        if self.full:
            return
        _, found = flatten((args, kwargs))
        key = tuple((path, tensor.shape, tensor.dtype) for path, tensor in found)
        if not found or key in self._seen:
            return
        self._seen.add(key)
        if not self.examples:
            self.touched_batch = any(_address(tensor) in batch for _, tensor in found)
        rows = _rows_to_keep([tensor for _, tensor in found])
        # Tensors made under inference mode cannot be exported; a clone made outside of it can.
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = map_tensors((args, kwargs), lambda tensor: _copy(tensor, rows))
        self.examples.append(Example(args, kwargs))


def _rows_to_keep(tensors: list[torch.Tensor]) -> tuple[int, int] | None:
    """Return (size of axis 0 to cut, rows to keep) when a call is too large to keep whole."""
    if sum(tensor.nbytes for tensor in tensors) <= MAX_BYTES:
        return None
    sizes = [tensor.shape[0] for tensor in tensors if tensor.ndim]
    common = max(set(sizes), key=sizes.count)
    return (common, KEPT_ROWS) if common > KEPT_ROWS else None


def _copy(tensor: torch.Tensor, rows: tuple[int, int] | None) -> torch.Tensor:
    tensor = tensor.detach()
    if rows is not None and tensor.ndim and tensor.shape[0] == rows[0]:
        tensor = tensor[: rows[1]]
    return tensor.to("cpu", copy=True).contiguous()


def _address(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:  # sparse tensors have no single storage
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


class Observer:
    """Records the outermost calls of a module and of its children until enough was seen.

    Args:
        root: The module in training; ``""`` is its name.
        targets: Names of the submodules to watch; default: the root and its children, so that a
            root whose ``forward`` is never called is noticed.
        is_redirected: Tells whether a call of the root is not a call of its ``forward`` (a training
            framework may route ``training_step`` through it).
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        targets: tuple[str, ...] | None = None,
        is_redirected: Callable[[nn.Module], bool] = lambda _: False,
    ) -> None:
        self._root = root
        self._is_redirected = is_redirected
        self._watched = dict(_outer_modules(root)) if targets is None else _named(root, targets)
        self._recorders: dict[str, Recorder] = {}
        self._handles: list[RemovableHandle] = []
        self._inside: list[bool] = []
        self._batch: set[int] = set()

    @property
    def active(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    @property
    def recorders(self) -> dict[str, Recorder]:
        """The modules that were called from outside, in order of their first call."""
        return self._recorders

    def start(self) -> None:
        """Install the hooks."""
        for name, module in self._watched.items():
            if not isinstance(module, torch.jit.ScriptModule):  # these take no hooks
                self._handles += self._watch(name, module)

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inside.clear()

    def begin_batch(self, batch: Any) -> None:
        """Note which tensors come from the data loader; also the start of a step."""
        self._inside.clear()
        try:
            self._batch = {_address(tensor) for _, tensor in flatten(batch)[1]}
        except Exception:  # a batch may be any object of the user's
            self._batch = set()
            logger.debug("The tensors of a batch could not be listed.", exc_info=True)

    def choose(self) -> str | None:
        """Return the name of what should be exported, or ``None`` if nothing was called.

        The root, if its ``forward`` was called; else the first child that was called with data of
        the batch; else the first child that was called.
        """
        called = {name: rec for name, rec in self._recorders.items() if rec.examples}
        fed = [name for name, recorder in called.items() if recorder.touched_batch]
        return "" if "" in called else next(iter([*fed, *called]), None)

    def _watch(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts = not (module is self._root and self._is_redirected(module))
            if counts and not any(self._inside):
                self._record(name, args, kwargs)
            self._inside.append(counts)

        def after(*_: Any) -> None:
            if self._inside:
                self._inside.pop()

        # First of all hooks: what the user's own hooks change is part of the module.
        yield module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        yield module.register_forward_hook(after, always_call=True)

    def _record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self._recorders.setdefault(name, Recorder())
        try:
            recorder.record(args, kwargs, self._batch)
        except Exception:
            logger.warning("A call of %r could not be recorded.", name or "forward", exc_info=True)


def _outer_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "", root
    yield from _callable_children(root, "")


def _callable_children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children; containers that are never called themselves give theirs."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _named(root: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: root.get_submodule(name) for name in targets}
