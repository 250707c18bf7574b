"""What PyTorch itself says of a module before anything is exported."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from onnxport._torch_compat import export_context
from onnxport.errors import ExportError
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.global_state import preserved_globals
from onnxport.exporter.isolation import isolated, watched
from onnxport.pipeline.randomness import first_random_module, reseed
from onnxport.pipeline.runs import run_flat
from onnxport.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from onnxport.pipeline.job import LiveReference

__all__ = ["compare_with_live", "first_run"]

Tensors = tuple[torch.Tensor, ...]


def first_run(flat: FlatModule, tensors: Tensors) -> list[tuple[tuple[object, ...], torch.Tensor]]:
    """Run with two seeds: the module must run, give tensors, and not be random.

    Raises:
        ExportError: If it does not.
    """
    try:
        with preserved_globals(), export_context():
            first, flat.keeps_state = watched(flat, lambda: flat.run_nested(_clones(tensors)))
        with preserved_globals():
            reseed()
            second = _run_nested(flat, tensors)
    except Exception as error:
        raise ExportError(
            f"The module does not run in eval mode on an observed call: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not first:
        raise ExportError("The module's result holds no tensor, so there is no output to export.")
    if not _all_close(first, second, 0.0) and _is_random(flat, tensors, first, second):
        where = first_random_module(flat, tensors)
        raise ExportError(
            f"The module stays random in eval mode: two runs on the same rows differ{where}, so no "
            "model could be compared with it. Look for F.dropout without training=self.training, "
            "torch.rand or sampling in forward."
        )
    return first


def _is_random(
    flat: FlatModule,
    tensors: Tensors,
    first: Sequence[tuple[object, torch.Tensor]],
    second: Sequence[tuple[object, torch.Tensor]],
) -> bool:
    """Tell draws from rounding, where two seeds do not give the same.

    What is the same bit by bit but for the seed differs by what was drawn, however little.
    """
    again = _run_nested(flat, tensors)
    return not _all_close(first, second, 1e-7 if _all_close(first, again, 0.0) else 1e-5)


def _clones(tensors: Tensors) -> Tensors:
    return tuple(tensor.clone() for tensor in tensors)


def _run_nested(
    flat: FlatModule, tensors: Tensors
) -> list[tuple[tuple[object, ...], torch.Tensor]]:
    fresh = isolated(flat) if flat.keeps_state else nullcontext()
    with preserved_globals(), export_context(), fresh:
        return flat.run_nested(_clones(tensors))


def compare_with_live(module: nn.Module, reference: LiveReference) -> None:
    """Refuse a copy that does not compute what the module in training computes.

    Raises:
        ExportError: If it does not, or does not run.
    """
    spec, found = flatten((reference.example.args, dict(reference.example.kwargs)))
    try:
        rows = [tensor for _, tensor in found]
        outputs = run_flat(FlatModule(module, spec), rows, isolate=True)
    except Exception as error:
        raise ExportError(
            f"The module runs in training but its copy does not: {type(error).__name__}: {error}. "
            "Does forward use the trainer or other state outside of the module?"
        ) from error
    same = len(outputs) == len(reference.outputs) and all(
        _close(ours, theirs, reference.rtol)
        for ours, theirs in zip(outputs, reference.outputs, strict=False)
    )
    if not same:
        raise ExportError(
            "A copy of the module with the checkpoint's weights does not compute what the module "
            "in training computes. Either it stays random in eval mode (F.dropout without "
            "training=self.training, sampling), or forward depends on state outside of the module "
            "(the trainer, the current epoch, a global)."
        )


def _all_close(
    first: Sequence[tuple[object, torch.Tensor]],
    second: Sequence[tuple[object, torch.Tensor]],
    rtol: float,
) -> bool:
    return len(first) == len(second) and all(
        _close(a, b, rtol) for (_, a), (_, b) in zip(first, second, strict=True)
    )


def _close(a: torch.Tensor, b: torch.Tensor, rtol: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b) or rtol > 1e-3  # noqa: PLR2004 - another device breaks ties otherwise
    scale = float(b.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=rtol, atol=rtol * scale, equal_nan=True)
