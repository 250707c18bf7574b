"""Commands for what a training run has left: models, notes, versions; and for the machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from onnxport.cli.output import INCOMPLETE, emit, line_of, or_exit

if TYPE_CHECKING:
    from onnxport.report import ExportReport, TrackingRecord

__all__ = ["doctor", "promote", "resume", "rollback", "serve", "sync"]


def resume(
    folder: Annotated[Path, "Folder of checkpoints; with dirpath=, that of the models."],
    *,
    json: bool = False,
) -> None:
    """Make the models that an interrupted training run still owes, in FOLDER and all below it.

    From the checkpoints and the notes beside them alone: neither the training script nor its
    packages are needed. What cannot be made like this is made by the next fit.
    """  # noqa: DOC501 - this text is the help on the screen
    import typer

    from onnxport.callbacks.resume import resume as resume_folder
    from onnxport.tracking.job import jobs_in

    def tell(report: ExportReport) -> None:
        if not json:
            typer.echo(line_of(report))

    reports = or_exit(lambda: resume_folder(folder, tell), as_json=json)
    made = sum(report.ok for report in reports)
    if json:
        emit([asdict(report) for report in reports])
    else:
        typer.echo(
            f"{made} of {len(reports)} models made." if reports else "No model is owed here."
        )
        untold = sum(1 for _ in jobs_in([folder]))
        if untold:
            typer.echo(f"MLflow is to be told of {untold} of the models: `onnxport sync {folder}`.")
    if made < len(reports):
        raise typer.Exit(INCOMPLETE)


def sync(folder: Annotated[Path, "Folder of checkpoints."], *, json: bool = False) -> None:
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
        if not json:
            typer.echo(f"{model}: {record.missing or held}")

    told = or_exit(lambda: sync_folder(folder, tell), as_json=json)
    done = sum(not record.missing for record in told.values())
    if json:
        emit({str(model): asdict(record) for model, record in told.items()})
    else:
        typer.echo(
            f"{done} of {len(told)} models told." if told else "Nothing is left to tell here."
        )
    if done < len(told):
        raise typer.Exit(INCOMPLETE)


def promote(
    name: Annotated[str, "Name of the registered model."],
    version: Annotated[int, "Number of the version."],
    alias: str = "champion",
    tracking_uri: str = "",
    *,
    pin: bool = True,
    json: bool = False,
) -> None:
    """Make a VERSION of the registered model NAME the champion, because you say so.

    Pinned, it stays until somebody promotes or rolls back; with --no-pin, training may replace it
    by a better one again. The address is --tracking-uri, or MLFLOW_TRACKING_URI.
    """
    import typer

    from onnxport.tracking import promote as promote_version

    before = or_exit(
        lambda: promote_version(
            name, version, alias=alias, tracking_uri=tracking_uri or None, pin=pin
        ),
        as_json=json,
    )
    if json:
        emit({"name": name, "alias": alias, "version": version, "before": before, "pinned": pin})
        return
    was = "none was before" if before is None else f"version {before} was before"
    pinned = "; pinned, no training will move it" if pin else ""
    typer.echo(f"Version {version} of {name} is {alias} now ({was}{pinned}).")


def rollback(
    name: Annotated[str, "Name of the registered model."],
    alias: str = "champion",
    tracking_uri: str = "",
    *,
    json: bool = False,
) -> None:
    """Give the champion's place of the registered model NAME back to the version before it.

    The version that loses it never gets it again by itself.
    """
    import typer

    from onnxport.tracking import rollback as roll_back

    was, now = or_exit(
        lambda: roll_back(name, alias=alias, tracking_uri=tracking_uri or None), as_json=json
    )
    if json:
        emit({"name": name, "alias": alias, "version": now, "rejected": was})
        return
    typer.echo(f"Version {now} of {name} is {alias} again; version {was} is rejected.")


def serve(
    model: Annotated[str, "Name of the registered model, or models:/... , runs:/... or a folder."],
    alias: str = "champion",
    host: str = "127.0.0.1",
    port: int = 5000,
    tracking_uri: str = "",
) -> None:
    """Serve a registered MODEL over HTTP: hands over to `mlflow models serve`.

    POST JSON to /invocations. Stops with Ctrl-C.
    """
    import os
    import sys

    from onnxport._optional import optional_import

    def require() -> None:
        with optional_import(extra="mlflow", needed_for="Serving a model"):
            import mlflow  # noqa: F401

    or_exit(require)
    plain = "/" not in model and ":" not in model and not Path(model).exists()
    uri = f"models:/{model}@{alias}" if plain else model
    if tracking_uri:
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    # MLflow starts the server by its bare name, which need not be on the path of a shell.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri]
    command += ["--host", host, "--port", str(port), "--env-manager", "local"]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # nosec # noqa: S606 - it takes the place of this process


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
    import typer

    from onnxport.doctor import diagnose

    findings = diagnose(folder, tracking_uri=tracking_uri or None)
    if json:
        emit([asdict(finding) for finding in findings])
    for finding in [] if json else findings:
        typer.echo(f"{'ok   ' if finding.ok else 'WRONG'} {finding.what}: {finding.found}")
        if not finding.ok:
            typer.echo(f"      {finding.advice}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(INCOMPLETE)
