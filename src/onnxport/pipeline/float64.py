"""Run a module in float64: what its outputs would be if PyTorch did not round.

A copy in float64 is twice as large as the weights. Of a large module only what a call needs is made
wide, and let go again, so that there is never more than one large parameter in float64.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from onnxport.pipeline.runs import run_flat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from onnxport.exporter.flat import FlatModule

__all__ = ["Float64"]

LARGE_MODULE = 2**28
"""Bytes of parameters; a smaller module is copied as a whole."""
LARGE_PARAMETER = 2**22
"""Bytes; smaller parameters are copied at once."""
_WRITING = frozenset(
    {"__setitem__", "__set__"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
    | {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift", "matmul")}
)
"""Operators of Python that change what they are applied to."""


class Float64:
    """A copy of a module that computes in float64. The module itself stays as it is.

    Args:
        flat: The module.

    Raises:
        Exception: Whatever the user's modules raise when they are copied or cast.
    """

    def __init__(self, flat: FlatModule) -> None:
        self._large = _large_parameters(flat)
        shared = {id(weight): weight for weight in self._large}
        with torch.no_grad():
            # Parameters are not copied before they are cast: they may be large.
            memo = shared | {
                id(weight): nn.Parameter(weight.to(torch.float64, copy=True), requires_grad=False)
                for weight in flat.parameters()
                if type(weight) is nn.Parameter and weight.is_floating_point()
                if id(weight) not in shared
            }
            self._module: FlatModule = copy.deepcopy(flat, memo)
            self._module._apply(  # type: ignore[no-untyped-call]  # noqa: SLF001 - as `double()`
                lambda tensor: tensor if id(tensor) in shared else _wide(tensor)
            )

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run on inputs that are cast first.

        Args:
            inputs: As the module takes them.

        Returns:
            The outputs, those of floating point in float64.
        """
        with self._widening():
            return run_flat(self._module, [_wide(tensor) for tensor in inputs])

    def _widening(self) -> AbstractContextManager[Any]:
        return _Widening(self._large) if self._large else nullcontext()


class _Widening(TorchFunctionMode):
    """Gives each function that is called with one of some parameters that parameter in float64.

    Args:
        parameters: Which ones.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._ids = {id(parameter) for parameter in parameters}

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # of an attribute, most often its shape
            value = func(*args)
            if id(args[0]) not in self._ids:
                return value
            return _wide(value) if not isinstance(value, torch.dtype) else torch.float64
        if self._writes(func, args):
            raise TypeError(f"{func.__name__} writes to a parameter that is not held in float64")
        args, kwargs = tree_map_only(torch.Tensor, self._widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _writes(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        name = getattr(func, "__name__", "")
        in_place = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
        return bool(in_place and args and id(args[0]) in self._ids)

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(torch.float64) if id(tensor) in self._ids else tensor


def _large_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are made wide only where they are needed."""
    parameters = list(module.parameters())
    if sum(weight.nbytes for weight in parameters) < LARGE_MODULE:
        return []
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return []  # calls inside of a script are no function calls of Python
    return [
        weight
        for weight in parameters
        if type(weight) is nn.Parameter and weight.is_floating_point()
        if weight.nbytes >= LARGE_PARAMETER and weight.dtype is not torch.float64
    ]


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value
