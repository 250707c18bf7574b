"""Commands for models and checkpoints: make, prove, look at, compare, measure."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from onnxport.cli.inputs import Inputs, facts_at
from onnxport.cli.output import INCOMPLETE, emit, line_of, or_exit, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxport.config import MLflow
    from onnxport.exporter.model_diff import ModelDifference
    from onnxport.exporter.model_facts import ModelFacts
    from onnxport.report import ExportReport
    from onnxport.signature import TensorSpec

__all__ = ["diff", "export", "inspect", "verify"]

_MOST_WEIGHTS = 10
"""So many weights that differ are listed."""


def export(  # noqa: PLR0913 - options of a command
    checkpoint: Annotated[Path, "A checkpoint, or a folder: all *.ckpt in it and below."],
    *,
    module: str = "",
    shape: list[str] | None = None,
    example: Path | None = None,
    datamodule: str = "",
    set: list[str] | None = None,  # noqa: A002 - the name of the option
    output: Path | None = None,
    target: str = "",
    core: str = "auto",
    opset: int | None = None,
    precision: str = "",
    variant: list[str] | None = None,
    register: str = "",
    tracking_uri: str = "",
    experiment: str = "",
    workers: int = 1,
    trust_checkpoint: bool = False,
    again: bool = False,
    json: bool = False,
) -> None:
    """Make a proven model of a CHECKPOINT, or of each one in a folder.

    --module is package.module:Class or file.py:Class. The hyperparameters come from the checkpoint;
    --set name=value gives others. What forward takes is said by --shape name=8x3x32x32:dtype
    for each input, by --example FILE (.pt, .npy, .npz), by --datamodule package.module:Class, or by
    the module's example_input_array. --variant fp16, int8 or int8-static makes smaller children of
    each model, too. A folder is done by --workers processes: one export, then
    refreshes; what has its model already is passed over, unless --again. With --tracking-uri, or
    --register NAME (at MLFLOW_TRACKING_URI, else on sqlite here), MLflow gets the models, in one
    run of --experiment. Exits with 1 if a model could not be made, or told.
    """  # noqa: DOC501 - this text is the help on the screen
    import typer

    from onnxport.callbacks.backfill import backfill, checkpoints_in
    from onnxport.cli.progress import progress

    def work() -> list[ExportReport]:
        found = checkpoints_in(checkpoint)
        inputs = Inputs(module, shape, example, datamodule, set, trust=trust_checkpoint)
        load, given, chosen = inputs.read(found)
        options: dict[str, Any] = {"core": core, "precision": precision or None}
        with progress(len(found), quiet=json) as tell:
            return backfill(
                checkpoint,
                load,
                given,
                dirpath=output,
                target=target or chosen or None,
                opset=opset,
                variants=variant or (),
                mlflow=_tracking(register, tracking_uri, experiment),
                workers=workers if len(found) > 1 else 0,
                again=again,
                tell=tell,
                **options,
            )

    start = time.time()
    reports = or_exit(work, as_json=json)
    made = sum(report.ok for report in reports)
    untold = [each for each in reports if each.tracking is not None and each.tracking.missing]
    if json:
        emit([asdict(report) for report in reports])
    else:
        for report in reports if len(reports) == 1 else []:
            typer.echo(line_of(report))
        if len(reports) > 1:
            had = sum(_is_older(report, start) for report in reports)
            more = f" {had} had one already." if had else ""
            typer.echo(f"{made} of {len(reports)} checkpoints have a proven model.{more}")
        for text in dict.fromkeys(str(each.tracking and each.tracking.missing) for each in untold):
            typer.echo(f"MLflow was not told, `onnxport sync` tells it later: {text}", err=True)
    if made < len(reports) or untold:
        raise typer.Exit(INCOMPLETE)


def _is_older(report: ExportReport, start: float) -> bool:
    """Tell whether a model was there before the command began."""
    model = Path(str(report.path))
    return report.ok and model.is_file() and model.stat().st_mtime < start


def verify(  # noqa: PLR0913 - options of a command
    model: Annotated[Path, "An ONNX model."],
    checkpoint: Annotated[Path, "The checkpoint that it should be of."],
    *,
    module: str = "",
    shape: list[str] | None = None,
    example: Path | None = None,
    datamodule: str = "",
    set: list[str] | None = None,  # noqa: A002 - the name of the option
    target: str = "",
    trust_checkpoint: bool = False,
    json: bool = False,
) -> None:
    """Prove that a MODEL is of a CHECKPOINT.

    The hash of the checkpoint's weights must be the one that the model was made of. With --module
    (see export), the two are also run at several sizes of each dynamic axis, as at an export. Exits
    with 1 if the model is of other weights or computes something else.
    """  # noqa: DOC501 - as above
    import typer

    inputs = Inputs(module, shape, example, datamodule, set, trust=trust_checkpoint)

    def work() -> dict[str, Any]:
        found = _compared(model, checkpoint)
        if module and (found["ok"] or not found["model"]):
            found |= _proven(model, checkpoint, inputs, target)
        return found

    result = or_exit(work, as_json=json)
    if json:
        emit(result)
    elif result["ok"]:
        runs = len(result.get("checks", ()))
        how = f"proven in {runs} runs" if runs else "the hash of the weights is the same"
        typer.echo(f"{model} is of {checkpoint}: {how}.")
    else:
        typer.echo(f"{model} is not proven to be of {checkpoint}: {result['why']}", err=True)
    if not result["ok"]:
        raise typer.Exit(INCOMPLETE)


def _compared(model: Path, checkpoint: Path) -> dict[str, Any]:
    """Compare the hash that a model holds with that of a checkpoint's weights.

    Raises:
        ConfigurationError: If there is no such file.
    """
    from onnxport.errors import ConfigurationError
    from onnxport.exporter.checkpoint_file import (
        is_readable,
        read_state_dict,
        weights_in_folder,
    )
    from onnxport.exporter.tied import with_tied
    from onnxport.exporter.weights import weights_sha256

    origin = facts_at(model).origin
    noted, checkpoint = origin.get("weights_sha256"), weights_in_folder(checkpoint)
    if not is_readable(checkpoint):
        raise ConfigurationError(f"There is no checkpoint at {checkpoint}.")
    state = read_state_dict(checkpoint)
    found = weights_sha256(with_tied(state, _tied_in(origin)))
    why = "" if noted == found else "it was made of other weights than the checkpoint holds."
    if why and checkpoint.name.startswith("adapter_model"):
        why = "the file holds an adapter, which is a part of the weights."
    if not noted:
        why = "it does not say which weights it is of. --module proves it by running both."
    return {"ok": not why, "model": noted, "checkpoint": found, "why": why}


def _tied_in(origin: Mapping[str, str]) -> list[list[str]]:
    """Return the names of weights that are one, as a model of anybody's says."""
    try:
        found = loads(origin.get("tied", "[]"))
    except (ValueError, RecursionError):
        return []
    groups = found if isinstance(found, list) else []
    return [
        names
        for names in groups
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    ]


def _proven(model: Path, checkpoint: Path, inputs: Inputs, target: str) -> dict[str, Any]:
    """Run a model beside the module of a checkpoint."""
    from onnxport.api import verify as prove
    from onnxport.errors import VerificationError
    from onnxport.exporter.target import find_target

    load, given, chosen = inputs.read([checkpoint])
    module = find_target(load(checkpoint), target or chosen)
    try:
        checks, why = prove(model, module, given), ""
    except VerificationError as error:
        checks, why = list(error.checks), str(error)
    return {"ok": not why, "why": why, "checks": [asdict(check) for check in checks]}


def inspect(model: Annotated[Path, "An ONNX model of any tool."], *, json: bool = False) -> None:
    """Say what a MODEL is: inputs, dynamic axes, operators, weights, and where it came from."""
    import typer

    facts = or_exit(lambda: facts_at(model), as_json=json)
    if json:
        emit(facts.to_dict())
        return
    for name, text in _lines_of(facts):
        typer.echo(f"{name:<12} {text}")


def diff(
    first: Annotated[Path, "An ONNX model."],
    second: Annotated[Path, "Another one."],
    *,
    json: bool = False,
) -> None:
    """Say how two models differ: interface, graph, weights, origin.

    Exits with 1 if they do not compute the same.
    """  # noqa: DOC501 - as above
    import typer

    from onnxport.exporter.model_diff import difference

    def work() -> ModelDifference:
        for file in (first, second):
            facts_at(file)
        return difference(first, second)

    found = or_exit(work, as_json=json)
    if json:
        emit(found.to_dict())
    else:
        for line in _lines_of_difference(found):
            typer.echo(line)
    if not found.equal:
        raise typer.Exit(INCOMPLETE)


# --- what they have in common ---------------------------------------------------------------


def _tracking(register: str, tracking_uri: str, experiment: str) -> bool | MLflow:
    from onnxport.config import MLflow

    if not (register or tracking_uri or experiment):
        return False
    options = MLflow(tracking_uri=tracking_uri or None, register=register or None)
    return replace(options, experiment=experiment) if experiment else options


def _lines_of(facts: ModelFacts) -> list[tuple[str, str]]:
    outside = f", weights in {', '.join(facts.external)}" if facts.external else ""
    lines = [("file", f"{facts.path} ({size_text(facts.bytes)}{outside})")]
    lines += [("input", _text(spec)) for spec in facts.inputs]
    lines += [("output", _text(spec)) for spec in facts.outputs]
    opset = ", ".join(f"{name or 'ai.onnx'} {number}" for name, number in facts.opset.items())
    lines += [("opset", opset), ("producer", facts.producer or "unknown")]
    nodes = sum(facts.operators.values())
    most = ", ".join(f"{count} {name}" for name, count in list(facts.operators.items())[:8])
    lines.append(("operators", f"{nodes}: {most}{', ...' if len(facts.operators) > 8 else ''}"))  # noqa: PLR2004
    kinds = ", ".join(f"{size_text(count)} {name}" for name, count in facts.weights.items())
    lines.append(("weights", f"{facts.parameters:,} parameters: {kinds or 'none'}"))
    if not facts.origin:
        lines.append(("origin", "unknown: onnxport has not made it"))
    lines += [(f"  {key}", value) for key, value in facts.origin.items()]
    return lines


def _text(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _lines_of_difference(found: ModelDifference) -> list[str]:
    lines = [*found.interface]
    lines.append("The graphs are the same." if found.same_graph else "The graphs differ.")
    for name, (ours, theirs) in found.operators.items():
        lines.append(f"operator {name}: {ours} / {theirs}")
    for where, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            some = ", ".join(names[:_MOST_WEIGHTS])
            lines.append(f"{len(names)} weights only in the {where}: {some}")
    if not (found.weights or found.only_first or found.only_second):
        lines.append("The weights are the same.")
    elif found.weights:
        lines.append(f"{len(found.weights)} weights differ:")
    for each in found.weights[:_MOST_WEIGHTS]:
        far = f"by up to {each.max_abs:.3g}, relative {each.relative:.3g}"
        lines.append(f"  {each.name}: {each.why if each.relative is None else far}")
    if len(found.weights) > _MOST_WEIGHTS:
        lines.append(f"  and {len(found.weights) - _MOST_WEIGHTS} more")
    lines += [f"{key}: {ours} / {theirs}" for key, (ours, theirs) in found.origin.items()]
    return lines
