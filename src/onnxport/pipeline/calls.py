"""Which of the observed calls describe one model, and what of them it takes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from onnxport._torch_compat import export_context
from onnxport.errors import InputInferenceError
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import isolated
from onnxport.exporter.target import FunctionModule
from onnxport.inputs.naming import input_names
from onnxport.inputs.unused import unused_tensors, without
from onnxport.tree import Example, Spec, constants, flatten, same_structure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

__all__ = ["of_one_structure", "used_parts"]

logger = logging.getLogger(__name__)


def used_parts(
    module: nn.Module, examples: Sequence[Example], warnings: list[str]
) -> Sequence[Example]:
    """Leave out what a function gets and does not use: a method may get labels with its batch."""
    if not examples or not isinstance(module, FunctionModule):
        return examples

    def run(*args: Any, **kwargs: Any) -> Any:
        with preserved_globals(), export_context(), isolated(module):
            return module(*args, **kwargs)

    try:
        unused = unused_tensors(run, examples[0])
    except Exception:  # the first run tells in a moment
        logger.debug("the function does not run", exc_info=True)
        return examples
    if unused:
        names = input_names(module.function, unused)
        warnings.append(f"{', '.join(names)}: not used, so no input of the model.")
    return [without(example, unused) for example in examples]


def of_one_structure(
    examples: Sequence[Example], warnings: list[str]
) -> tuple[Spec, list[tuple[object, ...]], tuple[tuple[torch.Tensor, ...], ...]]:
    """Keep the examples that have the structure of the first; say which others were seen.

    Raises:
        InputInferenceError: If no example holds a tensor.
    """
    flat = [flatten((example.args, dict(example.kwargs))) for example in examples]
    flat = [(spec, found) for spec, found in flat if found]
    if not flat:
        raise InputInferenceError(
            "No call of the model with a tensor was observed, so there is nothing to export it "
            "with. Run at least one batch before the first checkpoint, set example_input_array on "
            "the module, or give Inputs(example=...)."
        )
    spec, first = flat[0]
    paths = [path for path, _ in first]
    kind = [(path, tensor.dtype, tensor.ndim) for path, tensor in first]
    calls = [
        (other, tuple(tensor for _, tensor in found))
        for other, found in flat
        if same_structure(spec, other)
        and [(path, tensor.dtype, tensor.ndim) for path, tensor in found] == kind
    ]
    if len(calls) < len(flat):
        warnings.append(
            f"{len(flat) - len(calls)} observed calls had other arguments than the first one; the "
            "model is exported for the arguments of the first."
        )
    same = [(other, call) for other, call in calls if _same_constants(spec, other, warnings)]
    return spec, paths, tuple(call for _, call in same)


def _same_constants(spec: Spec, other: Spec, warnings: list[str]) -> bool:
    """Tell whether a call has the same numbers, bools and strings; note those that differ."""
    ours, theirs = constants(spec), constants(other)
    differing = {path for path, value in ours.items() if not _equal(value, theirs[path])}
    for path in sorted(differing, key=str):
        name = ".".join(str(key) for key in path[1:])
        text = (
            f"Argument {name!r} changed between calls ({ours[path]!r}, {theirs[path]!r}); it is no "
            f"tensor, so the model holds {ours[path]!r}. Pass a tensor to make it an input."
        )
        if text not in warnings:
            warnings.append(text)
    return not differing


def _equal(a: object, b: object) -> bool:
    try:
        return bool(a == b) or (type(a) is type(b) and not isinstance(a, (int, float, str, bool)))
    except Exception:  # noqa: BLE001 - comparing is code of the objects
        return type(a) is type(b)
