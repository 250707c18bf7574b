"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated

from onnxport._optional import optional_import
from onnxport.errors import OnnxportError

if TYPE_CHECKING:
    import typer

    from onnxport.report import ExportReport

__all__ = ["main"]


def resume(
    folder: Annotated[Path, "Folder of checkpoints."],
) -> None:
    """Make the models that an interrupted training run still owes, in FOLDER and all below it.

    From the checkpoints and the notes beside them alone: neither the training script nor its
    packages are needed. What cannot be made like this is made by the next fit.
    """  # noqa: DOC501 - this text is the help on the screen
    import typer

    from onnxport.callbacks.resume import resume as resume_folder

    try:
        reports = resume_folder(folder, lambda report: typer.echo(_line(report)))
    except OnnxportError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    made = sum(report.ok for report in reports)
    typer.echo(f"{made} of {len(reports)} models made." if reports else "No model is owed here.")
    if made < len(reports):
        raise typer.Exit(1)


def _line(report: ExportReport) -> str:
    if report.ok:
        return f"{report.path}: proven, largest error {report.max_abs_error or 0.0:.2g}"
    return f"{report.checkpoint}: no model. {report.error}"


def _app() -> typer.Typer:
    with optional_import(extra="cli", needed_for="The command onnxport"):
        import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True)
    app.command()(resume)

    @app.callback()
    def _top() -> None:
        """Every training checkpoint becomes a proven ONNX model."""

    return app


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: When it is done: 0: all is well; 1: some models could not be made; 2: the
            arguments are wrong, or something is not installed.
    """
    try:
        app = _app()
    except OnnxportError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    app()
