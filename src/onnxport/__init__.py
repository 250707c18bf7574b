"""onnxport: every training checkpoint becomes a proven ONNX model.

Names are resolved when they are first used: importing this package imports neither a training
framework, nor MLflow, nor ONNX Runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxport.api import export, verify
    from onnxport.callbacks.backfill import backfill
    from onnxport.callbacks.cadence import Cadence
    from onnxport.callbacks.lightning import OnnxExport
    from onnxport.callbacks.resume import resume
    from onnxport.callbacks.sync import sync
    from onnxport.config import Background, Inputs, Metrics, MLflow, Tolerance, Verify
    from onnxport.errors import (
        ConfigurationError,
        ExportError,
        InputInferenceError,
        MissingDependencyError,
        OnnxportError,
        ProviderError,
        PublishError,
        TrackingError,
        UnsafeFileError,
        VerificationError,
        WorkerError,
    )
    from onnxport.exporter.weights import weights_sha256
    from onnxport.report import Check, ExportReport, TrackingRecord
    from onnxport.tree import Example

__version__ = "0.1.0"

__all__ = [
    "Background",
    "Cadence",
    "Check",
    "ConfigurationError",
    "Example",
    "ExportError",
    "ExportReport",
    "InputInferenceError",
    "Inputs",
    "MLflow",
    "Metrics",
    "MissingDependencyError",
    "OnnxExport",
    "OnnxportError",
    "ProviderError",
    "PublishError",
    "Tolerance",
    "TrackingError",
    "TrackingRecord",
    "UnsafeFileError",
    "VerificationError",
    "Verify",
    "WorkerError",
    "__version__",
    "backfill",
    "export",
    "resume",
    "sync",
    "verify",
    "weights_sha256",
]

_HOMES = {
    "onnxport.api": ("export", "verify"),
    "onnxport.callbacks.backfill": ("backfill",),
    "onnxport.callbacks.cadence": ("Cadence",),
    "onnxport.callbacks.lightning": ("OnnxExport",),
    "onnxport.callbacks.resume": ("resume",),
    "onnxport.callbacks.sync": ("sync",),
    "onnxport.config": ("Background", "Inputs", "MLflow", "Metrics", "Tolerance", "Verify"),
    "onnxport.errors": (
        "ConfigurationError",
        "ExportError",
        "InputInferenceError",
        "MissingDependencyError",
        "OnnxportError",
        "ProviderError",
        "PublishError",
        "TrackingError",
        "UnsafeFileError",
        "VerificationError",
        "WorkerError",
    ),
    "onnxport.exporter.weights": ("weights_sha256",),
    "onnxport.report": ("Check", "ExportReport", "TrackingRecord"),
    "onnxport.tree": ("Example",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onnxport' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
