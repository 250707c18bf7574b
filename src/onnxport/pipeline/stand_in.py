"""An ONNX model in the place of what it was exported of: same calls, same kind of result."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from onnxport._torch_compat import export_context
from onnxport.errors import VerificationError
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import isolated
from onnxport.exporter.target import FunctionModule
from onnxport.tree import flatten, rebuild, same_structure

if TYPE_CHECKING:
    from torch import nn

    from onnxport.signature import ModelSignature
    from onnxport.tree import Spec
    from onnxport.validation.session import Session

__all__ = ["StandIn", "put_in_place"]

_Shapes = tuple[tuple[int, ...], ...]


class StandIn:
    """Answers a module's calls with an ONNX model.

    Args:
        session: The model.
        signature: Its inputs and outputs.
        spec: Structure of the calls that it was exported for.
        twin: The same module, which tells what its results look like: once for each shape.

    Attributes:
        calls: How often it was called.
    """

    def __init__(
        self, session: Session, signature: ModelSignature, spec: Spec, twin: nn.Module
    ) -> None:
        self._session = session
        self._specs = signature.inputs
        self._spec = spec
        self._twin = twin
        self._results: dict[_Shapes, tuple[Spec, list[torch.dtype]]] = {}
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            VerificationError: If the model does not take this call.
        """
        self.calls += 1
        tensors = self._inputs(args, kwargs)
        found = self._session.run([spec.name for spec in self._specs], tensors)
        spec, dtypes = self._result(tensors, args, kwargs)
        if len(found) != len(dtypes):
            raise VerificationError(
                f"The result of {type(self._twin).__name__} holds {len(dtypes)} tensors, and the "
                f"model has {len(found)} outputs."
            )
        return rebuild(spec, [out.to(kind) for out, kind in zip(found, dtypes, strict=True)])

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Return what the model gets of a call, in the order of its inputs.

        Raises:
            VerificationError: If it was exported for another kind of call.
        """
        spec, found = flatten((args, kwargs))
        if not same_structure(self._spec, spec):
            spec, found = flatten(self._rearranged(args, kwargs))
        if not same_structure(self._spec, spec) or len(found) != len(self._specs):
            raise VerificationError(
                f"{type(self._twin).__name__} was called with other arguments than it was exported "
                "for."
            )
        pairs = zip(found, self._specs, strict=True)
        return [_cast(tensor, wanted.dtype) for (_, tensor), wanted in pairs]

    def _rearranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a call with its arguments by position and by name as in the export."""
        known: Any = rebuild(self._spec, [None] * len(self._specs))
        twin = self._twin
        forward = twin.function if isinstance(twin, FunctionModule) else twin.forward
        try:
            given = inspect.signature(forward).bind(*args, **kwargs)
        except (TypeError, ValueError):  # it takes no such call, and says so itself
            return args, kwargs
        given.apply_defaults()
        values = dict(given.arguments)
        count, names = len(known[0]), list(values)
        if any(name not in values for name in known[1]) or count > len(names):
            return args, kwargs
        by_position = tuple(values[name] for name in names[:count])
        return by_position, {name: values[name] for name in known[1]}

    def _result(
        self, tensors: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Spec, list[torch.dtype]]:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self._results:
            with preserved_globals(), export_context(), isolated(self._twin):
                spec, found = flatten(self._twin(*args, **kwargs))
            self._results[shapes] = spec, [tensor.dtype for _, tensor in found]
        return self._results[shapes]


def put_in_place(target: nn.Module, stand_in: StandIn) -> None:
    """Let a stand-in answer the calls of a module or method; its hooks are in the model.

    Args:
        target: What :func:`~onnxport.exporter.target.find_target` gives for a name, of a copy that
            belongs to the caller.
        stand_in: Takes its place.
    """
    if isinstance(target, FunctionModule):
        setattr(target.owner, target.function.__name__, stand_in)
        return
    target._forward_hooks.clear()  # noqa: SLF001 - have no public way to be removed
    target._forward_pre_hooks.clear()  # noqa: SLF001 - see above
    target.forward = stand_in


def _cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The model may be of another precision than the module."""
    plain = tensor.detach().cpu()
    wanted = getattr(torch, dtype, plain.dtype)
    return plain.to(wanted) if plain.is_floating_point() else plain
