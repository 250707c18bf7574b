"""The command that makes the page of a run."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import Annotated, Any

from onnxport.cli.output import emit, or_exit

__all__ = ["report"]


def report(
    folder: Annotated[Path, "Folder of a run: of its history, or of its models and reports."],
    *,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Make the HTML page of the run in FOLDER: what became of each checkpoint, drawn.

    From onnxport.jsonl, the newest one in FOLDER or below, and from the reports beside models. One
    file with everything in it, FOLDER/onnxport.html if --output gives no other.
    """
    import typer

    from onnxport.page.document import PAGE, write_page
    from onnxport.page.folder import history_of

    def work() -> dict[str, Any]:
        run, page = history_of(folder), output or folder / PAGE
        write_page(run, page)
        return {"ok": True, "page": str(page), **run.to_dict()}

    made = or_exit(work, as_json=json)
    if json:
        emit(made)
    else:
        typer.echo(
            f"{made['page']}: {made['proven']} of {made['checkpoints']} checkpoints have a proven "
            "model."
        )
        if made["owed"]:
            typer.echo(f"{made['owed']} more are to be made: `onnxport resume {folder}`.")
