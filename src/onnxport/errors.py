"""Every exception that onnxport raises on purpose.

Each message names what failed, why, and what to do next. All data sit in ``args``, so an error
survives pickling on its way out of another process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

if TYPE_CHECKING:
    from onnxport.report import Check, ExportReport

__all__ = [
    "ConfigurationError",
    "ExportError",
    "InputInferenceError",
    "MissingDependencyError",
    "OnnxportError",
    "PublishError",
    "TrackingError",
    "VerificationError",
    "WorkerError",
]


class OnnxportError(Exception):
    """Base class of every error raised by onnxport."""


class ConfigurationError(OnnxportError, ValueError):
    """An argument is wrong or two arguments contradict each other."""


class MissingDependencyError(OnnxportError, ImportError):
    """An optional dependency is needed and not installed."""


class InputInferenceError(OnnxportError):
    """No usable example of the model's inputs could be found."""


class ExportError(OnnxportError, RuntimeError):
    """No core produced a model that passed the proof.

    Attributes:
        report: The failed report, with one attempt per core, or ``None``.
    """

    def __init__(self, message: str, report: ExportReport | None = None) -> None:
        super().__init__(message, report)
        self.report = report

    @override
    def __str__(self) -> str:
        return str(self.args[0])


class VerificationError(OnnxportError, RuntimeError):
    """An ONNX model does not do what the PyTorch module does.

    Attributes:
        checks: The checks that were made until the failure, the failed one included.
    """

    def __init__(self, message: str, checks: tuple[Check, ...] = ()) -> None:
        super().__init__(message, checks)
        self.checks = checks

    @override
    def __str__(self) -> str:
        return str(self.args[0])


class PublishError(OnnxportError, RuntimeError):
    """A proven model could not be written under its final name."""


class WorkerError(OnnxportError, RuntimeError):
    """The worker process died, hung, or was ended before it had made a model."""


class TrackingError(OnnxportError, RuntimeError):
    """The tracking server did not take a proven model."""
