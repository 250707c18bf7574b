"""The report beside a model: read, written, and what happens to an older model when it fails."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from onnxport._files import read_small
from onnxport.errors import OnnxportError, PublishError
from onnxport.exporter.ownership import is_our_report
from onnxport.exporter.writer import remove_model, report_path, write_text
from onnxport.report import ExportReport

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["discard_stale", "read_report", "save_report", "write_report"]

logger = logging.getLogger(__name__)


def read_report(path: Path) -> ExportReport | None:
    """Read the report beside a model; ``None`` if there is none of ours."""
    try:
        return ExportReport.from_json(read_small(report_path(path)).decode())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def save_report(report: ExportReport, path: Path) -> None:
    """Write the report beside the model; a disk that does not take it is logged.

    A report that says the same of the disk is the warning.
    """
    try:
        write_report(report, path)
    except (OnnxportError, OSError) as error:
        level = logging.DEBUG if report.code == PublishError.code else logging.WARNING
        logger.log(level, "The report of %s was not written: %s", path, error)


def write_report(
    report: ExportReport, path: Path, check: Callable[[], None] = lambda: None
) -> None:
    """Write the report beside the model.

    Args:
        report: The report.
        path: The model.
        check: See :func:`~onnxport.exporter.writer.write_text`.

    Raises:
        PublishError: If the disk does not take it, or a file of somebody else has its name.
    """
    file = report_path(path)
    if file.is_file() and not is_our_report(file):
        raise PublishError(f"{file} was not written by onnxport and is left alone.")
    write_text(file, report.to_json(), check)


def discard_stale(report: ExportReport, path: Path, *, known: bool = False) -> ExportReport:
    """Remove an older model of ours: it would hold other weights than its checkpoint.

    Args:
        report: Of the failure; returned, with what could not be removed.
        path: The model.
        known: It is ours, also if the disk does not let it be read.
    """
    try:
        remove_model(path, known=known)
    except OSError as error:
        stale = f"{path} holds older weights and cannot be removed ({error.strerror or error})."
        return replace(report, error=f"{report.error} {stale}")
    return report
