"""Make the models that a training run owes, without the run and without the module."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.owed import owed, settle, sweep, template_path
from onnxport.config import ExportOptions, Tolerance, Verify
from onnxport.errors import ConfigurationError, ExportError, OnnxportError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.pipeline import ExportJob, ModuleMissingError, Pipeline
from onnxport.pipeline.blueprint_file import load_blueprint
from onnxport.report import ExportReport
from onnxport.validation.session import require_runtime

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import nn

    from onnxport.callbacks.owed import Owed

__all__ = ["resume"]

logger = logging.getLogger(__name__)

_NEXT_FIT = "The next fit with this checkpoint folder makes the model."


def resume(
    folder: str | os.PathLike[str], tell: Callable[[ExportReport], None] = lambda _: None
) -> list[ExportReport]:
    """Make the models that an interrupted training run owes, from its checkpoints alone.

    A run that was killed, or that did not wait for its last models, has left notes in the folders
    of its checkpoints: the graph without weights, and for each checkpoint what the module in
    training computed with it. The weights are filled in, and ONNX Runtime must agree with what was
    noted. The training script, the module and its packages are not needed, and no code that is in
    a file is run.

    Args:
        folder: Where to look, and below.
        tell: Called with each report as it comes.

    Returns:
        One report per model that was owed. A model that cannot be made like this stays owed: the
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
    root = Path(folder)
    if not root.is_dir():
        raise ConfigurationError(f"There is no folder {root}. Give the folder of checkpoints.")
    require_runtime()
    reports: list[ExportReport] = []
    templates: dict[Path, Pipeline | OnnxportError] = {}
    for debt in owed([root]):
        template = template_path(debt.model, debt.name)
        if template not in templates:
            templates[template] = _pipeline(template)
        report = _pay(debt, templates[template])
        if report.ok:
            settle(debt.model)
        reports.append(report)
        tell(report)
    sweep(templates)
    return reports


@dataclass(frozen=True, slots=True)
class _File:
    """The weights of a checkpoint, of which the module is not here."""

    path: Path

    def state(self) -> Mapping[str, Any]:
        """Read the weights."""
        return read_state_dict(self.path)

    def module(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Refuse.

        Raises:
            ModuleMissingError: Always.
        """
        raise ModuleMissingError("the module is needed")


def _pipeline(template: Path) -> Pipeline | OnnxportError:
    if not template.is_file():
        return ExportError(
            f"There is no template at {template}: training ended before the first export was "
            f"proven, or the model needs more than its weights. {_NEXT_FIT}"
        )
    try:
        pipeline = Pipeline()
        pipeline.blueprint = load_blueprint(template)
    except OnnxportError as error:
        return error
    return pipeline


def _pay(debt: Owed, pipeline: Pipeline | OnnxportError) -> ExportReport:
    if isinstance(pipeline, OnnxportError):
        return ExportReport.of_failure(str(pipeline), debt.origin)
    if debt.reference is None:
        text = f"Nothing says what the module computes with {debt.checkpoint}. {_NEXT_FIT}"
        return ExportReport.of_failure(text, debt.origin)
    known = pipeline.blueprint
    try:
        return pipeline.run(
            ExportJob(
                source=_File(debt.checkpoint),
                examples=(),
                path=debt.model,
                options=_options(debt),
                target=debt.reference.target,
                provenance=replace(debt.origin, checkpoint=str(debt.checkpoint)),
                reference=debt.reference,
            )
        )
    except ModuleMissingError as error:
        why = " ".join(filter(None, getattr(error, "__notes__", ()))) or "The module is needed."
        return ExportReport.of_failure(f"{why} {_NEXT_FIT}", debt.origin)
    finally:
        pipeline.blueprint = known  # what does not fit one checkpoint may fit the next


def _options(debt: Owed) -> ExportOptions:
    content = debt.options or {}
    verify = Verify(
        tolerance=Tolerance(**content.get("tolerance", {})),
        providers=content.get("providers", "auto"),
    )
    return replace(
        ExportOptions.of(core="auto", inputs=None, opset=None, precision=None, verify=True),
        verify=verify,
    )
