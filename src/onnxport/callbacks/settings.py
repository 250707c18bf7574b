"""What a callback of any framework is told, checked once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from onnxport.callbacks.cadence import Cadence, When, read_when
from onnxport.callbacks.options import (
    AnyTarget,
    Preflight,
    read_background,
    read_mlflow,
    read_preflight,
    read_targets,
)
from onnxport.callbacks.page import pages_are_wanted
from onnxport.callbacks.remote import is_remote
from onnxport.config import (
    Background,
    ExportOptions,
    Inputs,
    Metrics,
    MLflow,
    Verify,
    require_choice,
)
from onnxport.errors import ConfigurationError
from onnxport.validation.session import require_runtime

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from onnxport.callbacks.run import ExportRun
    from onnxport.config import CoreName, Precision
    from onnxport.exporter.target import Target
    from onnxport.report import ExportReport

__all__ = ["ExportCallback", "Settings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a callback was told; see :class:`onnxport.OnnxExport` for each of them."""

    dirpath: Path | None
    cadence: Cadence
    targets: Mapping[str, Target | None]
    background: Background | None
    preflight: Preflight
    on_error: str
    console: bool
    page: bool
    mlflow: tuple[str, MLflow] | None
    options: ExportOptions


class ExportCallback:
    """What the callbacks of all frameworks take, and what they give back.

    Args:
        dirpath: See :class:`onnxport.OnnxExport`, as for all others.
        when: When a checkpoint becomes a model.
        core: How to export.
        target: What to export.
        inputs: Overrides of what is observed and inferred.
        opset: ONNX opset version.
        precision: Of the model.
        verify: How to prove.
        validate_metrics: For callbacks that can run a framework's own validation.
        variants: Smaller children of each model.
        latency: Measure how long runs take.
        mlflow: Which run to track models in.
        register: Name in the model registry.
        background: Where models are made.
        preflight: Whether the export is tried before the first checkpoint.
        on_error: What a failure leads to.
        console: Whether the user is told a line per model.
        page: Whether the run has a page.

    Attributes:
        settings: What was given.

    Raises:
        ConfigurationError: If an argument is wrong.
        MissingDependencyError: If ONNX Runtime or (where asked for) MLflow is missing.
    """

    def __init__(  # noqa: PLR0913 - flat keyword arguments, as callbacks have
        self,
        *,
        dirpath: str | os.PathLike[str] | None = None,
        when: When = "checkpoint",
        core: CoreName = "auto",
        target: AnyTarget = None,
        inputs: Inputs | None = None,
        opset: int | None = None,
        precision: Precision | None = None,
        verify: bool | Verify = True,
        validate_metrics: bool | int | Metrics = False,
        variants: Iterable[str] | Mapping[str, float] = (),
        latency: bool | float = False,
        mlflow: Literal["auto"] | bool | MLflow = "auto",
        register: str | None = None,
        background: bool | Background = True,
        preflight: bool | Literal["raise"] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        console: bool = True,
        page: bool | None = None,
    ) -> None:
        from onnxport.callbacks.run import ExportRun

        require_choice("on_error", on_error, ("warn", "raise"))
        worker = read_background(background)
        require_runtime(here=worker is None)
        self.settings = Settings(
            dirpath=_read_folder(dirpath),
            cadence=read_when(when),
            targets=read_targets(target),
            background=worker,
            preflight=read_preflight(preflight, worker),
            on_error=on_error,
            console=console,
            page=pages_are_wanted(page),
            mlflow=read_mlflow(mlflow, register),
            options=ExportOptions.of(
                core=core,
                inputs=inputs,
                opset=opset,
                precision=precision,
                verify=verify,
                validate_metrics=validate_metrics,
                variants=variants,
                latency=latency,
            ),
        )
        self._earlier: list[ExportReport] = []
        self._run = ExportRun(self.settings)
        self._reset()

    def _reset(self) -> None:
        """Set what an adapter keeps for itself."""

    @property
    def reports(self) -> list[ExportReport]:
        """One report per attempted checkpoint, in order."""
        return [*self._earlier, *self._run.reports]

    @property
    def preflight_reports(self) -> list[ExportReport]:
        """What came of the export before the first checkpoint, one per target."""
        return self._run.preflight_reports

    def should_export(self, trainer: Any, checkpoint: str) -> bool:  # noqa: ARG002 - for others
        """Decide whether a checkpoint that was just written becomes a model.

        Override this to decide in another way than by ``when``.

        Args:
            trainer: What the framework trains with.
            checkpoint: Path of the checkpoint.
        """
        return self.settings.cadence.should_export(self._run.saves)

    def _begin(self, run: ExportRun) -> None:
        """Training begins, again perhaps: what was reported before stays."""
        self._earlier, self._run = self.reports, run

    @override
    def __getstate__(self) -> dict[str, Any]:
        return self._portable()

    def _portable(self) -> dict[str, Any]:
        """Return what another process can have of this one."""
        return vars(self) | {"_run": type(self._run)(self.settings), "_earlier": self.reports}


def _read_folder(dirpath: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder for all models.

    Raises:
        ConfigurationError: If it is none of this machine.
    """
    if not isinstance(dirpath, (str, os.PathLike, type(None))):
        raise ConfigurationError(f"dirpath= must be a folder, got {dirpath!r}.")
    if dirpath is not None and is_remote(dirpath):
        raise ConfigurationError(
            f"dirpath= must be a folder of this machine, got {str(dirpath)!r}. Without it, "
            "models lie beside their checkpoints, on remote file systems too."
        )
    return None if dirpath is None else Path(dirpath)
