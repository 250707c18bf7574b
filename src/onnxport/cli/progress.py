"""A bar for long work, on a terminal; lines elsewhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport._optional import is_available
from onnxport.cli.output import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from onnxport.report import ExportReport

__all__ = ["progress"]


@contextmanager
def progress(count: int, *, quiet: bool = False) -> Iterator[Callable[[ExportReport], None]]:
    """Show how far the models of many checkpoints have come.

    Args:
        count: How many there are.
        quiet: Show nothing.

    Yields:
        What is told of each report.
    """
    import typer

    if quiet or count == 1:
        yield lambda _: None
    elif not (sys.stderr.isatty() and is_available("rich")):
        yield lambda report: typer.echo(line_of(report), err=True)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("checkpoints", total=count)

            def tell(report: ExportReport) -> None:
                name = Path(str(report.checkpoint)).name
                bar.update(task, advance=1, description=name.replace("[", r"\["))

            yield tell
