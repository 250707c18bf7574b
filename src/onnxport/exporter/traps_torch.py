"""Traps in torch itself: what its exporters cannot translate, written in plain operators."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "baked_parametrizations",
    "given_causality",
    "math_attention",
    "plain_adaptive_pooling",
    "plain_cells",
    "plain_take_along_dim",
    "replaced",
    "rounded_sizes",
    "unchecked_distributions",
]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value in the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def math_attention(_: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products: the fused form decomposes into a view that cannot be."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def given_causality(_: nn.Module) -> Iterator[None]:
    """Transformer layers take ``is_causal`` as given instead of comparing the mask's values."""
    from torch.nn.modules import transformer

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:  # noqa: ARG001
        return bool(is_causal)

    # Both readings compute the same: the mask itself is always given too.
    with replaced(transformer, "_detect_is_causal_mask", detect):
        yield


@contextmanager
def unchecked_distributions(_: nn.Module) -> Iterator[None]:
    """``torch.distributions`` does not look at the values of its parameters."""
    from torch.distributions import Distribution

    before = Distribution._validate_args  # noqa: SLF001 - the setter has no getter
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


# --- parametrizations -------------------------------------------------------------------------


@contextmanager
def baked_parametrizations(module: nn.Module) -> Iterator[None]:
    """Parametrized weights (weight norm, spectral norm, orthogonal) become plain tensors.

    The class of the module is swapped for the one it had before: ``remove_parametrizations`` would
    delete a property from a class that a live module may share.
    """
    with ExitStack() as undo:
        for submodule in list(module.modules()):
            if parametrize.is_parametrized(submodule):
                undo.callback(_bake(submodule))
        yield


def _bake(module: nn.Module) -> Callable[[], None]:
    """Bake one module; returns what undoes it."""
    names = list(module.parametrizations)  # type: ignore[arg-type]
    values = {name: getattr(module, name).detach().clone() for name in names}
    kind, parts = type(module), dict(module._modules)  # noqa: SLF001
    del module._modules["parametrizations"]  # noqa: SLF001
    module.__class__ = kind.__mro__[1]
    for name, value in values.items():
        module.register_buffer(name, value)

    def restore() -> None:
        for name in names:
            module._buffers.pop(name)  # noqa: SLF001
        module.__class__ = kind
        module._modules.clear()  # noqa: SLF001 - all of them, in the order that they had
        module._modules.update(parts)  # noqa: SLF001

    return restore


# --- recurrent cells --------------------------------------------------------------------------


class _PlainRNNCell(nn.RNNCell):
    @override
    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        state = hx if hx is not None else _no_state(input, self.hidden_size)
        sums = nn.functional.linear(input, self.weight_ih, self.bias_ih)
        sums = sums + nn.functional.linear(state, self.weight_hh, self.bias_hh)
        return sums.tanh() if self.nonlinearity == "tanh" else sums.relu()


class _PlainGRUCell(nn.GRUCell):
    @override
    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        state = hx if hx is not None else _no_state(input, self.hidden_size)
        of_input = nn.functional.linear(input, self.weight_ih, self.bias_ih).chunk(3, -1)
        of_state = nn.functional.linear(state, self.weight_hh, self.bias_hh).chunk(3, -1)
        reset = (of_input[0] + of_state[0]).sigmoid()
        update = (of_input[1] + of_state[1]).sigmoid()
        new = (of_input[2] + reset * of_state[2]).tanh()
        return (1.0 - update) * new + update * state


class _PlainLSTMCell(nn.LSTMCell):
    @override
    def forward(
        self, input: torch.Tensor, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hx is None:
            state, cell = (
                _no_state(input, self.hidden_size),
                _no_state(input, self.hidden_size),
            )
        else:
            state, cell = hx
        sums = nn.functional.linear(input, self.weight_ih, self.bias_ih)
        gates = (sums + nn.functional.linear(state, self.weight_hh, self.bias_hh)).chunk(4, -1)
        cell = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh()
        return gates[3].sigmoid() * cell.tanh(), cell


def _no_state(rows: torch.Tensor, size: int) -> torch.Tensor:
    shape = list(rows.shape)
    shape[-1] = size
    return torch.zeros(shape, dtype=rows.dtype, device=rows.device)


_PLAIN_CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNNCell: _PlainRNNCell,
    nn.GRUCell: _PlainGRUCell,
    nn.LSTMCell: _PlainLSTMCell,
}


@contextmanager
def plain_cells(module: nn.Module) -> Iterator[None]:
    """Recurrent cells are written out: the TorchScript core has no translation of theirs."""
    swapped = [one for one in module.modules() if type(one) in _PLAIN_CELLS]
    kinds = [type(one) for one in swapped]
    for one in swapped:
        one.__class__ = _PLAIN_CELLS[type(one)]
    try:
        yield
    finally:
        for one, kind in zip(swapped, kinds, strict=True):
            one.__class__ = kind


# --- functions --------------------------------------------------------------------------------


@contextmanager
def plain_adaptive_pooling(_: nn.Module) -> Iterator[None]:
    """Adaptive average pooling is two matrix products, whose matrices follow the size.

    ONNX has no such operator, and the decomposition of torch fixes the input's size.
    """
    functional = nn.functional
    with ExitStack() as stack:
        for name, axes in (("adaptive_avg_pool1d", 1), ("adaptive_avg_pool2d", 2)):
            pool = _pooling(axes)
            stack.enter_context(replaced(functional, name, pool))
            if hasattr(torch, name):
                stack.enter_context(replaced(torch, name, pool))
        yield


def _pooling(axes: int) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def pool(input: torch.Tensor, output_size: Any) -> torch.Tensor:  # noqa: A002 - torch's name
        several = isinstance(output_size, (tuple, list))
        sizes = tuple(output_size) if several else (output_size,) * axes
        result = input
        for axis, size in zip(range(-axes, 0), sizes, strict=True):
            if size is None:
                continue
            if size == 1:
                result = result.mean(axis, keepdim=True)
                continue
            means = _window_means(size, result.shape[axis], result)
            result = (result.movedim(axis, -1) @ means).movedim(-1, axis)
        return result

    return pool


def _window_means(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the matrix of shape ``(size, count)`` that averages ``count`` windows.

    Window ``i`` covers ``floor(i size / count)`` to ``ceil((i + 1) size / count)``, as documented
    for ``torch.nn.AdaptiveAvgPool1d``.
    """
    windows = torch.arange(count, device=like.device)
    places = torch.arange(size, device=like.device)[:, None]
    first = (windows * size) // count
    last = ((windows + 1) * size + count - 1) // count
    inside = ((places >= first) & (places < last)).to(like.dtype)
    return inside / inside.sum(0, keepdim=True)


@contextmanager
def plain_take_along_dim(_: nn.Module) -> Iterator[None]:
    """``take_along_dim`` is a gather at indices of full size."""
    with (
        replaced(torch, "take_along_dim", _take_along_dim),
        replaced(torch.Tensor, "take_along_dim", _take_along_dim),
    ):
        yield


def _take_along_dim(
    input: torch.Tensor,  # noqa: A002 - torch's name
    indices: torch.Tensor,
    dim: int | None = None,
) -> torch.Tensor:
    if dim is None:
        return input.reshape(-1).gather(0, indices.reshape(-1))
    dim %= input.ndim
    wanted, given = list(indices.shape), list(input.shape)
    for axis in range(input.ndim):
        if axis == dim:
            continue
        if indices.shape[axis] == 1:
            wanted[axis] = input.shape[axis]
        else:
            given[axis] = indices.shape[axis]
    return input.expand(given).gather(dim, indices.expand(wanted))


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
