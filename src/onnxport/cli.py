"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from onnxport._optional import optional_import
from onnxport.errors import OnnxportError

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer

    from onnxport.report import ExportReport, TrackingRecord

__all__ = ["main"]

Result = TypeVar("Result")


def resume(
    folder: Annotated[Path, "Folder of checkpoints; with dirpath=, that of the models."],
) -> None:
    """Make the models that an interrupted training run still owes, in FOLDER and all below it.

    From the checkpoints and the notes beside them alone: neither the training script nor its
    packages are needed. What cannot be made like this is made by the next fit.
    """  # noqa: DOC501 - this text is the help on the screen
    import typer

    from onnxport.callbacks.resume import resume as resume_folder
    from onnxport.tracking.job import jobs_in

    reports = _or_exit(lambda: resume_folder(folder, lambda report: typer.echo(_line(report))))
    made = sum(report.ok for report in reports)
    typer.echo(f"{made} of {len(reports)} models made." if reports else "No model is owed here.")
    if reports and any(jobs_in([folder])):
        typer.echo(f"`onnxport sync {folder}` tells MLflow of them.")
    if made < len(reports):
        raise typer.Exit(1)


def sync(
    folder: Annotated[Path, "Folder of checkpoints."],
) -> None:
    """Tell MLflow of the models in FOLDER and below that it was to be told of, and was not.

    After a run that was killed, or whose server was down. What was begun is completed, and nothing
    is logged twice. A password in the address is taken from MLFLOW_TRACKING_URI.
    """  # noqa: DOC501 - as above
    import typer

    from onnxport.callbacks.sync import sync as sync_folder

    def tell(model: Path, record: TrackingRecord) -> None:
        held = f"logged model {record.model_id}"
        if record.version is not None:
            held += f", version {record.version} of {record.registered_name}"
        typer.echo(f"{model}: {record.missing or held}")

    told = _or_exit(lambda: sync_folder(folder, tell))
    done = sum(not record.missing for record in told.values())
    typer.echo(f"{done} of {len(told)} models told." if told else "Nothing is left to tell here.")
    if done < len(told):
        raise typer.Exit(1)


def promote(
    name: Annotated[str, "Name of the registered model."],
    version: Annotated[int, "Number of the version."],
    alias: str = "champion",
    tracking_uri: str = "",
    *,
    pin: bool = True,
) -> None:
    """Make a VERSION of the registered model NAME the champion, because you say so.

    Pinned, it stays until somebody promotes or rolls back; with --no-pin, training may replace it
    by a better one again. The address is --tracking-uri, or MLFLOW_TRACKING_URI.
    """
    import typer

    from onnxport.tracking import promote as promote_version

    before = _or_exit(
        lambda: promote_version(
            name, version, alias=alias, tracking_uri=tracking_uri or None, pin=pin
        )
    )
    was = "none was before" if before is None else f"version {before} was before"
    pinned = "; pinned, no training will move it" if pin else ""
    typer.echo(f"Version {version} of {name} is {alias} now ({was}{pinned}).")


def rollback(
    name: Annotated[str, "Name of the registered model."],
    alias: str = "champion",
    tracking_uri: str = "",
) -> None:
    """Give the champion's place of the registered model NAME back to the version before it.

    The version that loses it never gets it again by itself.
    """
    import typer

    from onnxport.tracking import rollback as roll_back

    was, now = _or_exit(lambda: roll_back(name, alias=alias, tracking_uri=tracking_uri or None))
    typer.echo(f"Version {now} of {name} is {alias} again; version {was} is rejected.")


def doctor(
    folder: Annotated[Path, "Where models will go."] = Path(),
    tracking_uri: str = "",
    *,
    json: bool = False,
) -> None:
    """Say what this machine has for making models, what of it really runs, and what is wrong.

    Starts a worker, writes a small file to --folder, and asks the tracking server (--tracking-uri,
    or MLFLOW_TRACKING_URI) for a sign of life. Exits with 1 if anything is wrong.
    """  # noqa: DOC501 - as above
    from dataclasses import asdict
    from json import dumps

    import typer

    from onnxport.doctor import diagnose

    findings = diagnose(folder, tracking_uri=tracking_uri or None)
    if json:
        typer.echo(dumps([asdict(finding) for finding in findings], indent=2))
    for finding in [] if json else findings:
        typer.echo(f"{'ok   ' if finding.ok else 'WRONG'} {finding.what}: {finding.found}")
        if not finding.ok:
            typer.echo(f"      {finding.advice}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _or_exit(work: Callable[[], Result]) -> Result:
    import typer

    try:
        return work()
    except OnnxportError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def _line(report: ExportReport) -> str:
    if report.ok:
        return f"{report.path}: proven, largest error {report.max_abs_error or 0.0:.2g}"
    return f"{report.checkpoint}: no model. {report.error}"


def _app() -> typer.Typer:
    with optional_import(extra="cli", needed_for="The command onnxport"):
        import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True)
    for command in (resume, sync, promote, rollback, doctor):
        app.command()(command)

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
