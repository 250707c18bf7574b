"""What goes in and out of a model: names, dtypes, static sizes and symbolic dimensions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onnxport.errors import ConfigurationError

__all__ = ["Axes", "ModelSignature", "TensorSpec"]

Axes = tuple[dict[int, str], ...]
"""For each tensor, its dynamic axes: position -> name of the symbolic dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Args:
        name: Name in the graph.
        dtype: Name of the numpy dtype, e.g. ``"float32"``.
        shape: A size for each static dimension, a name for each symbolic one.

    Raises:
        ConfigurationError: If the name is empty or a size is negative.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigurationError("A tensor needs a name, got ''. Give it a non-empty one.")
        if any(isinstance(size, int) and size < 0 for size in self.shape):
            raise ConfigurationError(
                f"Sizes of {self.name!r} must not be negative, got {self.shape!r}. "
                "Use a name for a symbolic dimension."
            )

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Position -> name of the symbolic dimension."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorSpec:
        """Read what :meth:`to_dict` wrote."""
        return cls(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSignature:
    """The inputs and outputs of a model, in graph order.

    Raises:
        ConfigurationError: If two tensors share a name.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigurationError(
                f"Names of inputs and outputs must be unique, got {doubled!r} more than once. "
                "Give other ones with Inputs(names=..., output_names=...)."
            )

    @property
    def input_axes(self) -> Axes:
        """The dynamic axes of each input."""
        return tuple(spec.dynamic_axes for spec in self.inputs)

    @property
    def output_axes(self) -> Axes:
        """The dynamic axes of each output."""
        return tuple(spec.dynamic_axes for spec in self.outputs)
