"""What one case of the zoo is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch import nn

    from onnxport import Example

__all__ = ["Case", "Sizes"]

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, calls of it at any size, and the sizes to judge it at.

    Args:
        name: ``"<family>/<model>"``, unique.
        build: Makes the module; the runner seeds torch before and calls ``eval()`` after.
        call: Makes one call from sizes, e.g. ``call(batch=4, sequence=12)``, with fresh random
            values; the runner seeds torch before.
        observed: Sizes of the calls that training is supposed to have made. All have one batch
            size; where a second dimension varies in real use, two of its sizes.
        fresh: Sizes of the independent check, none of them observed: three batch sizes, and two
            sizes of each other dimension that varies.
        ours: Whether the model was written for this benchmark.
        inexpressible: Why ONNX cannot express the model at all; ``""`` when it can.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[..., Example]
    observed: tuple[Sizes, ...]
    fresh: tuple[Sizes, ...]
    ours: bool = False
    inexpressible: str = ""
    notes: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def family(self) -> str:
        """What stands before the slash."""
        return self.name.partition("/")[0]

    def axes(self) -> dict[str, dict[int, str]]:
        """The axes that a person would write by hand: leaf -> axis -> name of the dimension.

        They are read off the calls themselves: one dimension at a time is given another size, and
        the axes that change are its axes. Leaves are named by their key path in ``(args, kwargs)``.
        """
        base = dict(self.observed[0])
        found: dict[str, dict[int, str]] = {}
        before = _shapes(self.call(**base))
        for dim, usual in base.items():
            other = next((s[dim] for s in self.fresh if s[dim] != usual), usual)
            after = _shapes(self.call(**base | {dim: other}))
            for leaf, shape in before.items():
                for axis, size in enumerate(shape):
                    if after[leaf][axis] != size:
                        found.setdefault(leaf, {})[axis] = dim
        return found


def _shapes(example: Example) -> dict[str, tuple[int, ...]]:
    leaves, _ = pytree.tree_flatten_with_path((tuple(example.args), dict(example.kwargs)))
    return {
        pytree.keystr(path): tuple(leaf.shape)
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }
