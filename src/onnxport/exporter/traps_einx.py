"""A trap of einx, which writes and keeps code for the very sizes that it sees."""

from __future__ import annotations

import itertools
import math
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from onnxport.exporter.traps_torch import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["symbolic_einx", "uses_einx"]

FIRST_PRIME = 1009
"""Hardly a size is a multiple of one; einx multiplies sizes in 32 bits, so they cannot be large."""


@contextmanager
def symbolic_einx(_: nn.Module) -> Iterator[None]:
    """Einx keeps sizes symbolic: it takes ``int()`` of each and writes code for just these.

    It gets a prime in place of each symbolic size. Where its code calls torch, a number that such
    primes divide becomes the product of their sizes again.
    """
    registry = sys.modules.get("einx._src.frontend.backend")
    backends = getattr(registry, "registry", None)
    if backends is None:
        yield
        return
    sizes = _Sizes()
    with sizes, replaced(backends.get_by_name("torch"), "get_shape", sizes.shape):
        yield


def uses_einx(module: nn.Module) -> bool:
    """Tell whether a file that defines one of the modules imports something of einx."""
    names = {type(submodule).__module__ for submodule in module.modules()} & set(sys.modules)
    values = [value for name in names for value in vars(sys.modules[name]).values()]
    origins = (
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        for value in values
    )
    return any(isinstance(one, str) and one.partition(".")[0] == "einx" for one in origins)


class _Sizes(TorchFunctionMode):
    """Shows symbolic sizes as primes, and reads products of these primes as sizes again."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, torch.SymInt] = {}
        odd = itertools.count(FIRST_PRIME, 2)
        self._primes = (n for n in odd if all(n % d for d in range(3, math.isqrt(n) + 1, 2)))

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the shape that einx sees."""
        return tuple(self._shown(size) for size in tensor.shape)

    def _shown(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        for prime, known in self._sizes.items():
            if _is_one_axis(known, size):
                return prime
        rest, product = size.node.expr, 1
        for prime, known in self._sizes.items():
            while (rest / known.node.expr).as_numer_denom()[1] == 1 and rest != 1:
                rest, product = rest / known.node.expr, product * prime
        if rest.is_number:  # a multiple of sizes that were seen
            return product * int(rest)
        prime = next(self._primes)
        self._sizes[prime] = size
        return prime

    def _read(self, value: Any) -> Any:
        if type(value) in {list, tuple}:
            return type(value)(self._read(part) for part in value)
        if type(value) is not int or value < FIRST_PRIME:
            return value
        result: Any = 1
        for prime, size in self._sizes.items():
            while value % prime == 0:
                value, result = value // prime, result * size
        return value * result

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: self._read(value) for name, value in (kwargs or {}).items()}
        if func is torch.arange and named.get("dtype") is torch.int32:
            named["dtype"] = torch.int64  # it is multiplied by a size, which is int64 in ONNX
        return func(*(self._read(value) for value in args), **named)


def _is_one_axis(a: torch.SymInt, b: torch.SymInt) -> bool:
    ours, theirs = a.node, b.node
    if ours.expr.is_Symbol and theirs.expr.is_Symbol and ours.has_hint() and theirs.has_hint():
        # Equal sizes of two inputs are one axis; comparing them says so to the exporter.
        return bool(ours.hint == theirs.hint) and bool(a == b)
    return bool(ours.expr == theirs.expr)
