"""Make the models that a training run owes, without the run and without the module."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.owed import NO_USE, owed, settle, sweep, template_of, used_below
from onnxport.callbacks.refused import refused
from onnxport.config import ExportOptions, Tolerance, Verify
from onnxport.errors import ConfigurationError, ExportError, OnnxportError
from onnxport.exporter.checkpoint_file import is_checkpoint, read_state_dict
from onnxport.exporter.tied import with_tied
from onnxport.exporter.writer import remove_model
from onnxport.pipeline import ExportJob, ModuleMissingError, Pipeline
from onnxport.pipeline.blueprint_file import load_blueprint
from onnxport.report import ExportReport, Provenance
from onnxport.tracking.base import Model
from onnxport.tracking.job import Job, save_job
from onnxport.validation.session import require_runtime

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import nn

    from onnxport.callbacks.owed import Owed

__all__ = ["resume"]

logger = logging.getLogger(__name__)

_NEXT_FIT = "The next fit with this checkpoint folder makes the model, if the module is as it was."


def resume(
    folder: str | os.PathLike[str], tell: Callable[[ExportReport], None] = lambda _: None
) -> list[ExportReport]:
    """Make the models that an interrupted training run owes, from its checkpoints alone.

    A run that was killed, or that did not wait for its last models, has left notes in the folders
    of its checkpoints: the graph without weights, and for each checkpoint what the module in
    training computed with it. The weights are filled in, and ONNX Runtime must agree with what was
    noted. The training script, the module and its packages are not needed, and no code that is in
    a file is run. What a tracking server should hold then is noted, too, for
    :func:`~onnxport.sync` or the next fit.

    Args:
        folder: Where to look, and below.
        tell: Called with each report as it comes.

    Returns:
        One report per model that was owed. A model that cannot be made like this stays owed; the
        next fit makes it.

    Raises:
        ConfigurationError: If there is no such folder.
        MissingDependencyError: If ONNX Runtime is not installed.

    Example:
        >>> import tempfile, onnxport
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     onnxport.resume(folder)  # nothing is owed here
        []
    """
    root = Path(folder).absolute()  # so that reports name files from wherever they are read
    if not root.is_dir():
        found = f"{root} is a file" if root.exists() else f"There is no folder {root}"
        raise ConfigurationError(
            f"{found}. Give the folder of checkpoints, or of models, if dirpath= has named one."
        )
    require_runtime()
    reports: list[ExportReport] = []
    pipelines: dict[Path, Pipeline | OnnxportError] = {}

    def made(report: ExportReport) -> None:
        reports.append(report)
        tell(report)

    def unclear(model: Path, why: str) -> None:
        made(ExportReport.of_failure(f"{why} {NO_USE}", Provenance(checkpoint=str(model))))

    for noted in owed([root], unclear=unclear):
        debt = replace(noted, template=template_of(noted, root))
        report = _pay(debt, pipelines)
        if report.ok and is_checkpoint(debt.checkpoint):
            _note_for_server(debt, report)
            settle(debt.model)
        elif report.ok:  # removed meanwhile, by a run that still goes on
            remove_model(debt.model)
            continue
        made(report)
    for note in refused([root]):
        why = f"The folder of {note.model} (dirpath=) has taken no note of it. {_NEXT_FIT} "
        why += f"Remove {note.file}, and it is owed no more."
        made(ExportReport.of_failure(why, Provenance(checkpoint=str(note.checkpoint))))
    sweep(used_below(root), keep=not all(report.ok for report in reports))
    return reports


@dataclass(frozen=True, slots=True)
class _File:
    """The weights of a checkpoint, of which the module is not here."""

    path: Path
    tied: tuple[tuple[str, ...], ...]

    def state(self) -> Mapping[str, Any]:
        """Read the weights."""
        return with_tied(read_state_dict(self.path), self.tied)

    def module(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Refuse.

        Raises:
            ModuleMissingError: Always.
        """
        raise ModuleMissingError("the module is needed")


def _pay(debt: Owed, pipelines: dict[Path, Pipeline | OnnxportError]) -> ExportReport:
    """Make one model; whatever is wrong is said in the report."""
    try:
        return _make(debt, pipelines)
    except ModuleMissingError as error:
        why = " ".join(filter(None, getattr(error, "__notes__", ()))) or "The module is needed."
    except OnnxportError as error:
        why = str(error)
    except Exception as error:  # values in a damaged note may be of any kind
        logger.debug("%s could not be made.", debt.model, exc_info=True)
        why = f"The note of {debt.model} is damaged: {type(error).__name__}: {error}."
    return ExportReport.of_failure(f"{why} {_NEXT_FIT}", _origin(debt))


def _make(debt: Owed, pipelines: dict[Path, Pipeline | OnnxportError]) -> ExportReport:
    """Fill in the weights and prove.

    Raises:
        ExportError: If there is too little to prove it with.
        ModuleMissingError: If the graph is not right for these weights.
    """
    if debt.replaced:
        raise ExportError(f"{debt.checkpoint} is another one than when its model was noted.")
    if debt.reference is None:
        raise ExportError(
            f"It is not noted what the module computes with {debt.checkpoint}: training ended "
            "before that, it ran on a GPU, or the result has more than 16 MB."
        )
    if debt.template is None:
        raise ExportError("The target is a wrapper around the module, which is needed for it.")
    if debt.template not in pipelines:
        pipelines[debt.template] = _pipeline(debt.template)
    pipeline = pipelines[debt.template]
    if isinstance(pipeline, OnnxportError):
        raise pipeline
    job = ExportJob(
        source=_File(debt.checkpoint, debt.tied),
        examples=(),
        path=debt.model,
        options=_options(debt),
        target=debt.reference.target,
        provenance=_origin(debt),
        reference=debt.reference,
        fingerprint=debt.fingerprint,
    )
    known = pipeline.blueprint
    if known is None or known.fingerprint is None or debt.fingerprint is None:
        raise ExportError("It is not known whether the module has changed.")
    # What is noted of the live module is compared, too; without the module there is no more proof.
    if changed := known.changed(job, often=1):
        raise ExportError(f"The module has changed in what is no weight: {min(changed)}.")
    try:
        return pipeline.run(job)
    finally:
        pipeline.blueprint = known  # what does not fit one checkpoint may fit the next


def _note_for_server(debt: Owed, report: ExportReport) -> None:
    """Note what a tracking server should hold; a disk that refuses is said."""
    model = Model.of_file(debt.model, report, _origin(debt))
    if debt.address is None or model is None:
        return
    job = Job(model=model.path, place=model.place, address=debt.address, content=model)
    try:
        save_job(job)
    except OSError as error:
        logger.warning("%s is not noted for %s: %s", debt.model, debt.address.uri, error)


def _origin(debt: Owed) -> Provenance:
    return replace(debt.origin, checkpoint=str(debt.checkpoint))


def _pipeline(template: Path) -> Pipeline | OnnxportError:
    if not template.is_file():
        return ExportError(
            f"There is no template {template}: training ended before the first export was proven, "
            "or a model needs more than weights (a wrapper, another precision, a GPU)."
        )
    try:
        pipeline = Pipeline()
        pipeline.blueprint = load_blueprint(template)
    except OnnxportError as error:
        return error
    return pipeline


def _options(debt: Owed) -> ExportOptions:
    content = debt.options or {}
    verify = Verify(
        tolerance=Tolerance(**content.get("tolerance", {})),
        providers=content.get("providers", "auto"),
        gpu_memory_mb=content.get("gpu_memory_mb"),
    )
    return replace(
        ExportOptions.of(core="auto", inputs=None, opset=None, precision=None, verify=True),
        verify=verify,
        variants=tuple((str(name), float(most)) for name, most in content.get("variants", ())),
    )
