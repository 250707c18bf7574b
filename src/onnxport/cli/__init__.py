"""The command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from onnxport._optional import optional_import
from onnxport.errors import OnnxportError

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer

__all__ = ["main"]


def _app() -> typer.Typer:
    with optional_import(extra="cli", needed_for="The command onnxport"):
        import typer

    from onnxport.cli import bench, models, report, runs
    from onnxport.cli.help import with_help

    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    made: tuple[Callable[..., None], ...] = (
        models.export,
        models.verify,
        models.inspect,
        models.diff,
        bench.bench,
    )
    left: tuple[Callable[..., None], ...] = (
        report.report,
        runs.resume,
        runs.sync,
        runs.promote,
        runs.rollback,
        runs.serve,
        runs.doctor,
    )
    for command in made:
        app.command(rich_help_panel="Models and checkpoints")(with_help(command))
    for command in left:
        app.command(rich_help_panel="Runs, the registry, the machine")(with_help(command))

    @app.callback()
    def _top() -> None:
        """Every training checkpoint becomes a proven ONNX model."""

    return app


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: When it is done: 0: all is well; 1: some models could not be made, or are not
            what they should be; 2: the arguments are wrong, or something is not installed.
    """
    try:
        app = _app()
    except OnnxportError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    app()
