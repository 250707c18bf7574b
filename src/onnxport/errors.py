"""Every exception that onnxport raises on purpose.

Each message names what failed, why, and what to do next. Each class has a code, which reports and
the log show, and a page of that name in ``docs/errors``. All data sit in ``args``, so an error
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
    "ProviderError",
    "PublishError",
    "TrackingError",
    "UnsafeFileError",
    "VerificationError",
    "WorkerError",
]

UNEXPECTED = "OX900"
"""Code of what was raised by others: user code, a library, the system."""


class OnnxportError(Exception):
    """Base class of every error raised by onnxport.

    Attributes:
        code: Names its page in ``docs/errors``.
    """

    code: str = UNEXPECTED


def code_of(error: BaseException) -> str:
    """Return the code of any error.

    Example:
        >>> code_of(PublishError("The disk is full.")), code_of(ValueError())
        ('OX500', 'OX900')
    """
    return error.code if isinstance(error, OnnxportError) else UNEXPECTED


class ConfigurationError(OnnxportError, ValueError):
    """An argument is wrong or two arguments contradict each other."""

    code = "OX100"


class MissingDependencyError(OnnxportError, ImportError):
    """An optional dependency is needed and not installed."""

    code = "OX110"


class UnsafeFileError(OnnxportError, ValueError):
    """A file would have others read, or is larger or of another kind than it may be."""

    code = "OX120"


class InputInferenceError(OnnxportError):
    """No usable example of the model's inputs could be found."""

    code = "OX200"


class ExportError(OnnxportError, RuntimeError):
    """No core produced a model that passed the proof.

    Attributes:
        code: That of the report, if there is one.
        report: The failed report, with one attempt per core, or ``None``.
    """

    code = "OX300"

    def __init__(self, message: str, report: ExportReport | None = None) -> None:
        super().__init__(message, report)
        self.report = report
        if report is not None and report.code is not None:
            self.code = report.code  # a full disk, or no call that was seen, is no fault of a core

    @override
    def __str__(self) -> str:
        return str(self.args[0])


class VerificationError(OnnxportError, RuntimeError):
    """An ONNX model does not do what the PyTorch module does.

    Attributes:
        checks: The checks that were made until the failure, the failed one included.
    """

    code = "OX400"

    def __init__(self, message: str, checks: tuple[Check, ...] = ()) -> None:
        super().__init__(message, checks)
        self.checks = checks

    @override
    def __str__(self) -> str:
        return str(self.args[0])


class ProviderError(VerificationError):
    """An execution provider does not load or run a model, and says so.

    Who serves the model there would be told, too: unlike a wrong number, which nobody is told.

    Attributes:
        out_of_memory: Whether its device had too little memory.
    """

    code = "OX410"

    def __init__(
        self, message: str, checks: tuple[Check, ...] = (), out_of_memory: bool = False
    ) -> None:
        super().__init__(message, checks)
        self.args = (message, checks, out_of_memory)
        self.out_of_memory = out_of_memory


class PublishError(OnnxportError, RuntimeError):
    """A proven model could not be written under its final name."""

    code = "OX500"


class WorkerError(OnnxportError, RuntimeError):
    """The worker process died, hung, or was ended before it had made a model."""

    code = "OX600"


class TrackingError(OnnxportError, RuntimeError):
    """The tracking server did not take a proven model."""

    code = "OX700"
