"""Calls without the arguments that a deployed model does not get."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from onnxport.tree import Example

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ["leave_out"]


def leave_out(call: Example, names: Collection[str], function: Callable[..., Any]) -> Example:
    """Return a call without some of its arguments.

    Args:
        call: The call.
        names: Of the arguments, as the function names them.
        function: What is called.

    Example:
        >>> def forward(ids, mask=None, labels=None): ...
        >>> leave_out(Example((1, 2), {"labels": 3}), {"labels"}, forward)
        Example(args=(1, 2), kwargs={})
    """
    kwargs = {name: value for name, value in call.kwargs.items() if name not in names}
    given = list(inspect.signature(function).parameters)[: len(call.args)]
    first = next((place for place, name in enumerate(given) if name in names), None)
    if first is None:
        return Example(call.args, kwargs)
    # What comes after one that is left out is given by name.
    later = dict(zip(given[first:], call.args[first:], strict=False))
    kept = {name: value for name, value in later.items() if name not in names}
    return Example(call.args[:first], kept | kwargs)
