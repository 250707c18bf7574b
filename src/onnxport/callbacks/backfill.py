"""Models of checkpoints that training wrote long ago: one export, then refreshes, in processes."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from onnxport.api import read_examples
from onnxport.callbacks.live import LiveModule
from onnxport.callbacks.options import read_mlflow
from onnxport.callbacks.paths import ModelPaths, is_model_of
from onnxport.callbacks.runner import InlineRunner, Outcome, WorkerRunner
from onnxport.callbacks.sync import tell_server
from onnxport.config import Background, ExportOptions
from onnxport.errors import ConfigurationError, OnnxportError
from onnxport.exporter.checkpoint_file import is_readable, read_plain_content, read_state_dict
from onnxport.exporter.fingerprint import fingerprint
from onnxport.exporter.ownership import read_metadata
from onnxport.exporter.target import require_target
from onnxport.exporter.weights import weights_sha256
from onnxport.pipeline import ExportJob
from onnxport.pipeline.report_files import read_report
from onnxport.report import ExportReport, Provenance
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.job import Job
from onnxport.validation.session import require_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from onnxport.callbacks.runner import Runner
    from onnxport.config import CoreName, Inputs, MLflow, Precision, Verify
    from onnxport.exporter.target import Target
    from onnxport.tree import Example

__all__ = ["backfill", "checkpoints_in", "provenance_of"]

logger = logging.getLogger(__name__)

SUFFIX = ".ckpt"
AHEAD = 2
"""How many checkpoints wait for each process: what is read too early is out of memory again."""
PAUSE_S = 0.02
DRAIN_S = 5.0
"""How long models on their way are waited for after Ctrl-C."""


def backfill(  # noqa: PLR0913 - flat keyword arguments, one per choice
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    module: nn.Module | Callable[[Path], nn.Module],
    example: Any,
    *,
    dirpath: str | os.PathLike[str] | None = None,
    core: CoreName = "auto",
    target: Target | None = None,
    inputs: Inputs | None = None,
    opset: int | None = None,
    precision: Precision | None = None,
    verify: bool | Verify = True,
    variants: Iterable[str] | Mapping[str, float] = (),
    mlflow: bool | MLflow = False,
    register: str | None = None,
    workers: int = 1,
    again: bool = False,
    tell: Callable[[ExportReport], None] = lambda _: None,
) -> list[ExportReport]:
    """Make the models of checkpoints that are there already.

    The first one of a structure is exported, the others are refreshed and proven each. What has a
    proven model of its weights already is passed over.

    Args:
        checkpoints: Files, or a folder: all ``*.ckpt`` in it and below.
        module: A module whose weights the checkpoints hold; or a function that gets the path of
            one and returns its module. It is not touched. Where it returns the same object again,
            only the weights are exchanged.
        example: A call of the module, as for :func:`~onnxport.export`.
        dirpath: Folder for the models, below which they lie as their checkpoints do; default:
            beside each checkpoint.
        core: See :func:`~onnxport.export`; the next four, too.
        target: What to export of the module.
        inputs: Overrides of what is inferred.
        opset: ONNX opset version.
        precision: Of the models.
        verify: How to prove.
        variants: Smaller children of each model, see :class:`~onnxport.OnnxExport`. A model that is
            there already gets them only with ``again``.
        mlflow: ``True`` or :class:`~onnxport.MLflow`: log the models, all in one run, and register
            them by its policy; at its ``tracking_uri``, else ``MLFLOW_TRACKING_URI``, else on
            sqlite in the current folder. Epoch, step and the watched metric come from the
            checkpoints. What the server does not take is left for :func:`~onnxport.sync`.
        register: Name in the model registry; short for ``MLflow(register=...)``.
        workers: How many processes; 0: this one.
        again: Make models also where there is one.
        tell: Called with each report as it comes, perhaps by another thread.

    Returns:
        One report per checkpoint, in their order; of a model that was there already, the one that
        lies beside it. What the tracking server holds is in it.

    Raises:
        ConfigurationError: If there is no such folder or file, or an argument is wrong.
        MissingDependencyError: If ONNX Runtime is not installed.

    Example:
        >>> import tempfile, torch, onnxport
        >>> net = torch.nn.Linear(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in range(3):
        ...         torch.save({"state_dict": net.state_dict()}, f"{folder}/step={step}.ckpt")
        ...     example = torch.randn(8, 4)
        ...     reports = onnxport.backfill(folder, net, example, core="trace", workers=0)
        >>> [report.how for report in reports]
        ['export', 'refresh', 'refresh']
    """
    require_runtime(here=workers == 0)
    options = ExportOptions.of(
        core=core,
        inputs=inputs,
        opset=opset,
        precision=precision,
        verify=verify,
        variants=variants,
    )
    if target is not None and not isinstance(target, str) and not callable(target):
        raise ConfigurationError(f"target must be one name or one callable, got {target!r}.")
    given = example if options.inputs.example is None else options.inputs.example
    found = checkpoints_in(checkpoints)
    work = _Backfill(
        make=module if not isinstance(module, nn.Module) else lambda _: module,
        examples=read_examples(given),
        options=options,
        target=target or "",
        workers=_read_workers(workers),
        tell=tell,
    )
    roots = [Path(checkpoints)] if isinstance(checkpoints, (str, os.PathLike)) else []
    folder = None if dirpath is None else Path(dirpath)
    paths = _paths(found, ModelPaths(folder, roots))
    tracked = read_mlflow(mlflow or (register is not None), register)
    reports = work.run(paths, again=again)
    return reports if tracked is None else _told(list(paths.values()), reports, tracked[1])


def _paths(checkpoints: Sequence[Path], places: ModelPaths) -> dict[Path, Path]:
    """Return where the model of each checkpoint goes.

    Raises:
        ConfigurationError: If two of them have one place.
    """
    paths: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for file in checkpoints:
        path = paths[file] = places.of(str(file))
        other = taken.setdefault(path, file)
        if other != file:
            raise ConfigurationError(f"{other} and {file} would have one model, {path}.")
    return paths


def _told(
    paths: Sequence[Path], reports: Sequence[ExportReport], options: MLflow
) -> list[ExportReport]:
    """Tell the tracking server of the models; return the reports with what it holds."""
    address = _address(options)
    models = [
        Model.of_file(path, report, _origin(report))
        for path, report in zip(paths, reports, strict=True)
        if report.ok and not _is_told(report, address)
    ]
    there = [model for model in models if model is not None]
    best = max(there, key=_goodness, default=None)
    told = tell_server(
        Job(
            model=model.path,
            place=model.place,
            address=address,
            content=model,
            last=model is best,
            ended="FINISHED",
        )
        for model in there
    )
    return [
        report.with_tracking(told[path.absolute()]) if path.absolute() in told else report
        for path, report in zip(paths, reports, strict=True)
    ]


def _origin(report: ExportReport) -> Provenance:
    """Return where a model comes from, also if its checkpoint is gone meanwhile."""
    try:
        return provenance_of(Path(str(report.checkpoint)))
    except (OnnxportError, OSError):
        return Provenance(
            checkpoint=report.checkpoint,
            epoch=report.epoch,
            global_step=report.global_step,
            metrics=report.metrics,
        )


def _is_told(report: ExportReport, address: RunAddress) -> bool:
    """Tell whether the server has held a model since an earlier time."""
    held = report.tracking
    return (
        held is not None
        and not held.missing
        and held.uri == address.uri
        and held.registered_name == address.options.register
    )


def _goodness(model: Model) -> float:
    """Return a number that is larger for a better model; a later one is better than none."""
    origin = model.origin
    value = origin.metrics.get(origin.monitor or "", math.nan)
    return -math.inf if math.isnan(value) else value if origin.mode == "max" else -value


def _address(options: MLflow) -> RunAddress:
    uri, fit = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), secrets.token_hex(16)
    if uri:
        return RunAddress(uri=uri, fit=fit, options=options)
    here = Path.cwd()
    root = (here / "mlartifacts").as_uri()
    return RunAddress(
        uri=f"sqlite:///{here / 'mlflow.db'}", fit=fit, artifact_root=root, options=options
    )


def checkpoints_in(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """Return checkpoints: those in a folder and below, by name, or those that are given.

    Raises:
        ConfigurationError: If there is none, or something is not there.
    """
    if isinstance(checkpoints, (str, os.PathLike)):
        root = Path(checkpoints)
        if is_readable(root):
            return [root]
        if not root.is_dir():
            raise ConfigurationError(f"There is no checkpoint and no folder at {root}.")
        found = sorted(path for path in root.rglob(f"*{SUFFIX}") if is_readable(path))
        if not found:
            raise ConfigurationError(f"There is no {SUFFIX} file in {root}.")
        return found
    given = [Path(path) for path in checkpoints]
    absent = [path for path in given if not is_readable(path)]
    if absent:
        raise ConfigurationError(f"There is no checkpoint at {absent[0]}.")
    return given


def provenance_of(checkpoint: Path) -> Provenance:
    """Return what a checkpoint says of itself: epoch, step, and the metric that was watched.

    Raises:
        ExportError: If it cannot be read.
    """
    if checkpoint.is_dir():
        return Provenance(checkpoint=str(checkpoint))
    content = read_plain_content(checkpoint)
    watched = [
        state
        for state in _mappings(content.get("callbacks"))
        if isinstance(state.get("monitor"), str) and _is_number(state.get("current_score"))
    ]
    metrics = {str(state["monitor"]): float(state["current_score"]) for state in watched}
    return Provenance(
        checkpoint=str(checkpoint),
        epoch=_whole(content.get("epoch")),
        global_step=_whole(content.get("global_step")),
        metrics=metrics,
        monitor=next(iter(metrics), None),
        mode="max" if watched and watched[0].get("mode") == "max" else "min",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Backfill:
    """What all checkpoints have in common."""

    make: Callable[[Path], nn.Module]
    examples: Sequence[Example]
    options: ExportOptions
    target: Target
    workers: int
    tell: Callable[[ExportReport], None]

    def run(self, paths: Mapping[Path, Path], *, again: bool) -> list[ExportReport]:
        """Make the models; a Ctrl-C leaves those that are there, and nothing half-made."""
        reports: dict[Path, ExportReport] = {}

        def done(file: Path, report: ExportReport) -> None:
            reports[file] = report
            self.tell(report)

        left = {}
        for file, path in paths.items():
            known = None if again else _known(file, path)
            if known is None:
                left[file] = path
            else:
                reports[file] = known
        runners: list[Runner] = []
        try:
            for place, (file, path) in enumerate(left.items()):
                self._begin(file, path, place, runners, done)
            for runner in runners:
                runner.wait(math.inf, lambda _: None)
        except BaseException:
            for runner in runners:
                runner.wait(DRAIN_S / len(runners), lambda _: None)
            raise
        finally:
            for runner in runners:
                runner.close()
        return [reports[file] for file in paths]

    def _begin(
        self,
        file: Path,
        path: Path,
        place: int,
        runners: list[Runner],
        done: Callable[[Path, ExportReport], None],
    ) -> None:
        origin = Provenance(checkpoint=str(file))

        def finished(outcome: Outcome) -> None:
            gone = f"{file} was changed or removed meanwhile."
            done(file, outcome.report or ExportReport.of_failure(gone, origin))

        try:
            origin = provenance_of(file)
            module = self.make(file)
            if isinstance(self.target, str):
                require_target(module, self.target)
            runner = self._runner(module, place, runners)
            while len(runner.unfinished()) > AHEAD:
                time.sleep(PAUSE_S)
            live = LiveModule(module, read_state_dict(file))
            job = ExportJob(
                source=live,
                examples=tuple(self.examples),
                path=path,
                options=self.options,
                target=self.target,
                provenance=origin,
                fingerprint=fingerprint(module),
            )
        except Exception as error:  # user code makes the module
            logger.debug("%s could not be begun.", file, exc_info=True)
            done(file, ExportReport.of_failure("", origin).failed(error))
            return
        runner.run(job, live, file if file.is_file() else None, finished)

    def _runner(self, module: nn.Module, place: int, runners: list[Runner]) -> Runner:
        """Return whose turn it is; each has its own process, and learns the graph once."""
        count = max(1, self.workers)
        if len(runners) < count:
            runners.append(
                WorkerRunner(self._background(), module, len(runners))
                if self.workers
                else InlineRunner()
            )
        return runners[place % count]

    def _background(self) -> Background:
        """Nobody trains meanwhile: all cores are there for it."""
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        return Background(max_workers=self.workers, threads=threads, niceness=0)


def _known(checkpoint: Path, path: Path) -> ExportReport | None:
    """Return the report of a model that is there and holds the weights of its checkpoint."""
    report = read_report(path)
    if report is None or not report.ok or not is_model_of(path, checkpoint):
        return None
    try:
        digest = weights_sha256(read_state_dict(checkpoint))
    except (OnnxportError, OSError):
        return None  # it is tried, and said
    return report if read_metadata(path).get("weights_sha256") == digest else None


def _read_workers(workers: object) -> int:
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ConfigurationError(f"workers must be a whole number, at least 0; got {workers!r}.")
    return workers


def _mappings(value: Any) -> list[dict[str, Any]]:
    items = value.values() if isinstance(value, dict) else ()
    return [item for item in items if isinstance(item, dict)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
