"""Traps in torch itself: what its exporters cannot translate, written in plain operators."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from onnxport._torch_compat import decomposed, without_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "baked_parametrizations",
    "given_causality",
    "has_scalars",
    "known_scalars",
    "math_attention",
    "plain_adaptive_pooling",
    "plain_cells",
    "plain_distances",
    "plain_take_along_dim",
    "replaced",
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


# --- scalars ----------------------------------------------------------------------------------

_ASKED = {
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__int__", "__float__", "__index__", "item")
}


@contextmanager
def known_scalars(module: nn.Module) -> Iterator[None]:
    """Python may ask for the value of a scalar buffer (``if self.initialised``): it is a weight."""
    with _Known(module):
        yield


def has_scalars(module: nn.Module) -> bool:
    """Tell whether a module has scalar buffers that Python may ask for."""
    return any(
        buffer.ndim == 0 and not name.endswith("num_batches_tracked")
        for name, buffer in module.named_buffers()
    )


class _Known(TorchFunctionMode):
    """Answers for scalar buffers, and for scalars that are computed from nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._values = {
            name: buffer.detach().clone()
            for name, buffer in module.named_buffers()
            if buffer.ndim == 0
        }
        self._made: dict[int, tuple[torch.Tensor, Any, Any, Any]] = {}

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED and not torch._C._is_tracing():  # noqa: SLF001 - torch.jit.is_tracing
            with without_modes():
                value = self._value(args[0])
                if value is not None:
                    return func(value)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.ndim > 0:
            return result
        if any(result is part for part in args):  # written in place, and maybe through an alias
            self._values.clear()
            self._made.clear()
        else:  # the result itself is kept, too, so that its id stays its own
            self._made[id(result)] = (result, func, args, kwargs)
        return result

    def _value(self, part: Any) -> Any:
        """Return the value of a tensor, ``None`` where it is unknown; all else as it is."""
        if not isinstance(part, torch.Tensor):
            return part
        for name, buffer in self._module.named_buffers():
            if buffer is part:
                return self._values.get(name)
        if id(part) not in self._made:
            return None
        _, func, args, kwargs = self._made[id(part)]
        values = [self._value(value) for value in args]
        unknown = any(value is None for value in values)
        if unknown or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return None
        return func(*values, **kwargs)


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
            result = result @ means if axis == -1 else means.transpose(0, 1) @ result
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
    inside = torch.where((places >= first) & (places < last), 1.0, 0.0).to(like.dtype)
    return inside / inside.sum(0, keepdim=True)


EUCLIDEAN = 2
FEW_ROWS = 25
"""Up to so many rows ``torch.cdist`` subtracts them; it multiplies matrices beyond."""


@contextmanager
def plain_distances(_: nn.Module) -> Iterator[None]:
    """``cdist`` is subtractions or matrix products: the exporters have no translation of it."""
    operator = torch.ops.aten._cdist_forward.default  # noqa: SLF001 - the operator's name
    with replaced(torch, "cdist", _cdist), decomposed(operator, _cdist):
        yield


def _cdist(
    x1: torch.Tensor,
    x2: torch.Tensor,
    p: float = 2.0,
    compute_mode: Any = None,  # noqa: ARG001 - as torch.cdist
) -> torch.Tensor:
    rows = [x.shape[-2] for x in (x1, x2)]
    if p == EUCLIDEAN and any(type(count) is int and count > FEW_ROWS for count in rows):
        squares = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1).unsqueeze(-2)
        return (squares - 2 * x1 @ x2.transpose(-1, -2)).clamp(min=0).sqrt()
    apart = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).to(apart.dtype).sum(-1)
    if p == 1:
        return apart.sum(-1)
    if p == EUCLIDEAN:
        return apart.square().sum(-1).sqrt()
    return apart.amax(-1) if p == math.inf else apart.pow(p).sum(-1).pow(1 / p)


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
