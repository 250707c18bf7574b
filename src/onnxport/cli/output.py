"""What the commands print, for people and for programs, and how they end."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TypeVar

from onnxport.errors import OnnxportError, code_of
from onnxport.page.wording import size_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxport.report import ExportReport

__all__ = ["INCOMPLETE", "REFUSED", "emit", "line_of", "or_exit", "size_text"]

INCOMPLETE, REFUSED = 1, 2
"""Exit codes: something was not made, or is not as it should be; arguments are wrong, or something
is not installed."""

Result = TypeVar("Result")


def or_exit(work: Callable[[], Result], *, as_json: bool = False) -> Result:
    """Do something; an error of ours, or of the disk, is a sentence on stderr, and exit code 2.

    Raises:
        Exit: If so.
    """
    import typer

    try:
        return work()
    except (OnnxportError, OSError) as error:
        if as_json:
            emit({"ok": False, "error": str(error), "code": code_of(error)})
        else:
            typer.echo(f"{error} [{code_of(error)}]", err=True)
        raise typer.Exit(REFUSED) from error


def emit(value: Any) -> None:
    """Print strict JSON; numbers that are not finite are written as strings."""
    import typer

    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def line_of(report: ExportReport) -> str:
    """Say in a line what became of a checkpoint."""
    if report.ok:
        return f"{report.path}: proven, largest error {report.max_abs_error or 0.0:.2g}"
    return f"{report.checkpoint}: no model. {report.error}"
