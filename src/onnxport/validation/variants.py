"""Smaller children of a model, made by ONNX Runtime's own tools, and how far they are from it."""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch

from onnxport._optional import optional_import
from onnxport.errors import ExportError
from onnxport.report import Check, OutputError
from onnxport.validation.session import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np

    from onnxport.signature import TensorSpec
    from onnxport.validation.budget import Reference

__all__ = ["judge_variant", "write_variant"]

PROTOBUF_BYTES = 1_500_000_000
"""Larger models have their weights in a file of their own."""


def write_variant(
    name: str, model: Path, made: Path, samples: Iterable[Mapping[str, np.ndarray[Any, Any]]]
) -> None:
    """Make a variant of a model.

    Args:
        name: ``"fp16"``, ``"int8"`` or ``"int8-static"``.
        model: The model.
        made: Where the variant goes; external data go to ``<made>.data``.
        samples: Calls to calibrate on, by the names of the inputs.

    Raises:
        ExportError: If ONNX Runtime's tool refuses the model.
    """
    external = sum(file.stat().st_size for file in _files(model)) > PROTOBUF_BYTES
    makers: dict[str, Callable[[Path], None]] = {
        "fp16": lambda graph: _half(graph, made, external=external),
        "int8": lambda graph: _dynamic(graph, made, external=external),
        "int8-static": lambda graph: _static(graph, made, samples, external=external),
    }
    with tempfile.TemporaryDirectory(prefix="onnxport-", dir=made.parent) as folder, _quiet():
        try:
            graph = model if name == "fp16" else _prepared(model, Path(folder), external=external)
            makers[name](graph)
        except Exception as error:  # a tool that meets what it does not know
            raise ExportError(
                f"ONNX Runtime cannot make {name} of this model: {type(error).__name__}: {error}"
            ) from error


def _files(model: Path) -> list[Path]:
    return [file for file in (model, model.with_name(f"{model.name}.data")) if file.exists()]


def _half(model: Path, made: Path, *, external: bool) -> None:
    with optional_import(extra="ort", needed_for="A model of half the size"):
        from onnxruntime.transformers.float16 import convert_float_to_float16
    graph = convert_float_to_float16(
        onnx.load(model), keep_io_types=True, disable_shape_infer=external
    )
    sorted_graph = ir.from_proto(graph)
    sorted_graph.graph.sort()  # the tool puts casts of inputs at the end
    ir.save(sorted_graph, made, external_data=f"{made.name}.data" if external else None)


def _prepared(model: Path, folder: Path, *, external: bool) -> Path:
    """Fold what can be folded: a scale that is an operator of its own is quantized badly."""
    with optional_import(extra="ort", needed_for="A model in whole numbers"):
        from onnxruntime.quantization.shape_inference import quant_pre_process
    prepared = folder / "prepared.onnx"
    quant_pre_process(
        str(model),
        str(prepared),
        skip_symbolic_shape=True,
        skip_optimization=external,
        save_as_external_data=external,
    )
    return prepared


def _dynamic(model: Path, made: Path, *, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # ONNX Runtime has no kernel on the CPU for convolutions with signed weights.
    quantize_dynamic(
        str(model), str(made), weight_type=QuantType.QUInt8, use_external_data_format=external
    )


def _static(
    model: Path,
    made: Path,
    samples: Iterable[Mapping[str, np.ndarray[Any, Any]]],
    *,
    external: bool,
) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Calls(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._calls = iter(samples)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self._calls, None)

    quantize_static(
        str(model),
        str(made),
        Calls(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=external,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools give advice through the root logger."""
    root = logging.getLogger()

    def from_others(record: logging.LogRecord) -> bool:
        return record.name != "root"

    root.addFilter(from_others)
    try:
        yield
    finally:
        root.removeFilter(from_others)


def judge_variant(
    budget: float,
    specs: Sequence[TensorSpec],
    found: Sequence[torch.Tensor],
    expected: Sequence[Reference],
    sizes: Mapping[str, int],
) -> Check:
    """Compare what a variant gives with what PyTorch gave.

    Numbers may differ by a part of the largest value of their output; of whole numbers and truth
    values (a class, say), that part of the elements may be others.

    Args:
        budget: That part.
        specs: Outputs.
        found: What came out.
        expected: What PyTorch gave.
        sizes: Size of each symbolic dimension.
    """
    outputs = tuple(
        _judged(spec.name, budget, actual, wanted.expected)
        for spec, actual, wanted in zip(specs, found, expected, strict=True)
    )
    return Check(
        provider=CPU,
        sizes=dict(sizes),
        rows="real",
        reference=expected[0].source,
        outputs=outputs,
        ok=all(output.ok for output in outputs),
    )


def _judged(name: str, budget: float, actual: torch.Tensor, expected: torch.Tensor) -> OutputError:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        reason = (
            f"is {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        )
        return OutputError(
            name=name, max_abs_error=float("inf"), budget=budget, ok=False, reason=reason
        )
    if not expected.is_floating_point():
        error = float((actual != expected).double().mean()) if expected.numel() else 0.0
        return _within(name, error, budget, "of its elements are others")
    finite = expected.isfinite()
    same = bool(torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()))
    distance = (actual - expected)[finite].abs().double()
    error = float(distance.max()) if distance.numel() else 0.0
    largest = float(expected[finite].abs().max()) if distance.numel() else 0.0
    if not same or error != error:  # noqa: PLR0124 - NaN
        error = float("inf")
    return _within(name, error, budget * largest, "is the largest difference")


def _within(name: str, error: float, budget: float, what: str) -> OutputError:
    ok = error <= budget
    reason = "" if ok else f"{error:.3g} {what}, allowed is {budget:.3g}"
    return OutputError(name=name, max_abs_error=error, budget=budget, ok=ok, reason=reason)
