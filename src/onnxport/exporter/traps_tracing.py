"""Traps of the tracer: what Python asks of a tensor, and what a trace makes of assignments."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import rnn

from onnxport.exporter.traps_torch import replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["asks_for_len", "full_index_put", "read_packed_outputs", "rounded_sizes", "symbolic_len"]


@contextmanager
def rounded_sizes(_: nn.Module) -> Iterator[None]:
    """``round`` takes a size as the tracer sees it: a tensor."""

    def rounded(self: torch.Tensor, digits: int | None = None) -> torch.Tensor:
        return self.round().long() if digits is None else self.round(decimals=digits)

    torch.Tensor.__round__ = rounded  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del torch.Tensor.__round__  # type: ignore[attr-defined]


# --- len(tensor) ------------------------------------------------------------------------------


@contextmanager
def symbolic_len(module: nn.Module) -> Iterator[None]:
    """``len(tensor)`` stays a size of the graph: Python wants an int of it, which fixes the axis.

    The name is put into the files of the module's classes for the time of the export. It gives what
    ``len`` gives for all else, so another thread that runs their code meets no difference.
    """
    names = sorted({kind.__module__ for kind in _kinds(module)} & set(sys.modules))
    spaces = [vars(sys.modules[name]) for name in names]
    changed = [space for space in spaces if "len" not in space]
    for space in changed:
        space["len"] = _length
    try:
        yield
    finally:
        for space in changed:
            del space["len"]


def asks_for_len(module: nn.Module) -> bool:
    """Tell whether a method of the module's classes calls ``len``."""
    functions = (
        value
        for kind in _kinds(module)
        for value in vars(kind).values()
        if isinstance(value, FunctionType)
    )
    return any("len" in function.__code__.co_names for function in functions)


def _kinds(module: nn.Module) -> set[type]:
    """Return the classes of a module and its parts that are neither torch's nor ours."""
    skipped = {"torch", "builtins", "onnxport"}
    kinds = {kind for submodule in module.modules() for kind in type(submodule).__mro__}
    return {kind for kind in kinds if kind.__module__.partition(".")[0] not in skipped}


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)


# --- packed sequences -------------------------------------------------------------------------


@contextmanager
def read_packed_outputs(_: nn.Module) -> Iterator[None]:
    """Packed recurrent layers whose outputs nobody reads are given a reader.

    The pass that takes the packing out of a trace looks at the first reader of the outputs, and
    fails where there is none: an encoder of which only the last state is used.
    """
    with ExitStack() as stack:
        for kind in (nn.RNN, nn.LSTM, nn.GRU):
            stack.enter_context(replaced(kind, "forward", _with_reader(kind.forward)))
        yield


def _with_reader(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, input: Any, hx: Any = None) -> Any:  # noqa: A002 - torch's name
        output, state = forward(self, input, hx)
        if not isinstance(output, rnn.PackedSequence):
            return output, state
        nothing = rnn.pad_packed_sequence(output)[0][:0].sum()  # of no steps: exactly 0
        if isinstance(state, tuple):
            return output, tuple(one + nothing for one in state)
        return output, state + nothing

    return run


# --- assignment at indices --------------------------------------------------------------------


@contextmanager
def full_index_put(_: nn.Module) -> Iterator[None]:
    """Assignment at tensor indices names every axis: a trace has no ``x[..., index] = value``."""
    before = torch.Tensor.__setitem__  # inherited, so it is put back by deleting ours

    def assign(self: torch.Tensor, index: Any, value: Any) -> None:
        full = _with_whole_axes(self, index)
        if full is None:
            before(self, index, value)
        else:  # index_put in place is refused for these indices
            given = torch.as_tensor(value, dtype=self.dtype, device=self.device)
            self.copy_(self.index_put(full, given))

    torch.Tensor.__setitem__ = assign  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del torch.Tensor.__setitem__


def _with_whole_axes(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, ...] | None:
    """Write an index of tensors, numbers and whole axes as one tensor per axis, or ``None``."""
    parts = _spelled_out(tensor, index)
    if parts is None:
        return None
    places = [place for place, part in enumerate(parts) if isinstance(part, torch.Tensor)]
    wholes = [place for place, part in enumerate(parts) if isinstance(part, slice)]
    if not places or not wholes:
        return None
    # Indexed axes side by side stay where they are, others come first. A number selects before.
    kept = [place for place, part in enumerate(parts) if not isinstance(part, int)]
    spread = [kept.index(place) for place in places]
    together = spread == list(range(spread[0], spread[0] + len(spread)))
    front = sum(place < places[0] for place in wholes) if together else 0
    axes = max(parts[place].ndim for place in places)
    full = []
    for place, part in enumerate(parts):
        if isinstance(part, int):
            full.append(torch.tensor(part, device=tensor.device))
        elif isinstance(part, slice):
            rank = wholes.index(place)
            at = rank if rank < front else rank + axes
            shape = [-1 if axis == at else 1 for axis in range(axes + len(wholes))]
            full.append(torch.arange(tensor.shape[place], device=tensor.device).reshape(shape))
        else:
            full.append(part.reshape(tuple(part.shape) + (1,) * (len(wholes) - front)))
    return tuple(full)


def _spelled_out(tensor: torch.Tensor, index: Any) -> Sequence[Any] | None:
    """Return one part per axis; ``None`` if there is one of another kind."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        return None
    missing = [slice(None)] * (tensor.ndim - len(parts) + len(dots))
    place = dots[0] if dots else len(parts)
    parts[place : place + len(dots)] = missing
    return parts if all(map(_is_plain, parts)) else None


def _is_plain(part: Any) -> bool:
    if isinstance(part, torch.Tensor):
        return part.dtype in {torch.int64, torch.int32} and part.ndim > 0
    return part == slice(None) if isinstance(part, slice) else type(part) is int
