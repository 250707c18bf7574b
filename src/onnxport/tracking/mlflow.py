"""MLflow: one logged model per proven checkpoint, versions and an alias in the registry.

Only ``MlflowClient`` is used: the fluent API would end the trainer's run, or log to experiment 0.
Each step looks before it creates, so that it can be repeated after any failure; a model becomes
READY only when all its files are there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport._optional import optional_import
from onnxport.report import TrackingRecord
from onnxport.tracking.package import model_files_in_order, package_model
from onnxport.tracking.promotion import TAG_PREFIX, score_of, score_tags
from onnxport.tracking.reachable import require_reachable, without_password
from onnxport.tracking.registry import already_there_is_fine, register

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxport.report import ExportReport, Provenance
    from onnxport.tracking.base import RunAddress

__all__ = ["MlflowTracker", "require_mlflow"]

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 0.7
"""How long a server may take to answer before it counts as down; waited for at most twice a fit."""
REQUEST_TIMEOUT_S = 2
"""How long it may take for each answer, once it has given a sign of life."""
UPLOAD_BYTES_PER_S = 10_000_000
"""How fast it must take files."""
_ENVIRONMENT = {
    # Seconds, not the default 247 s; and no retries of creates, which would duplicate models.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def require_mlflow() -> None:
    """Fail early when MLflow is not installed.

    Raises:
        MissingDependencyError: With the command that installs it.
    """
    with optional_import(extra="mlflow", needed_for="MLflow tracking"):
        import mlflow  # noqa: F401


class MlflowTracker:
    """Publishes to one run.

    Args:
        address: Which run; one is started at the first model when there is none.
    """

    def __init__(self, address: RunAddress) -> None:
        self._options = address.options
        self._run = _Run(address)
        self._down: str | None = None

    def named(self, suffix: str) -> MlflowTracker:
        """Return a tracker to the same run, with another name in the registry."""
        if not suffix:
            return self
        register = self._options.register
        tracker = MlflowTracker(self._run.address)
        tracker._run = self._run
        if register is not None:
            tracker._options = replace(self._options, register=f"{register}{suffix}")
        return tracker

    def publish(self, report: ExportReport, origin: Provenance, *, last: bool) -> TrackingRecord:
        """Bring one proven model to the server; never raises.

        Once the server was found down, later calls return at once, until :meth:`resume`. What an
        earlier call has begun, and did not finish, is found and completed.
        """
        uri = without_password(self._run.address.uri)
        record = replace(report.tracking or TrackingRecord(uri=uri), uri=uri)
        if self._down is not None:
            return replace(record, missing=self._down)
        try:
            self._require_reachable()
            with _fail_fast():
                record = self._publish(report, origin, last=last)
        except Exception as error:  # noqa: BLE001 - MLflow, its store and its transport raise anything
            what = "the logged model, its metrics and its version"
            self._down = f"{what} are missing from {uri}: {_first_line(error)}"
            logger.warning("Tracking %s: %s", report.path, self._down)
            return replace(record, missing=self._down)
        self._down = None
        return record

    def resume(self) -> None:
        """Training is over: a server that was down may be asked again."""
        self._down = None

    def close(self, *, failed: bool) -> None:
        """End the run if it is ours; the run of a logger is never touched."""
        run = self._run
        if not run.started or run.address.run_id is None or self._down is not None:
            return
        try:
            with _fail_fast():
                _client(run.address.uri).set_terminated(
                    run.address.run_id, "FAILED" if failed else "FINISHED"
                )
        except Exception as error:  # noqa: BLE001 - as above
            logger.warning("The MLflow run was not ended: %s", _first_line(error))

    # --- steps ------------------------------------------------------------------------------

    def _require_reachable(self) -> None:
        require_reachable(self._run.address.uri, HEALTH_TIMEOUT_S)

    def _publish(self, report: ExportReport, origin: Provenance, *, last: bool) -> TrackingRecord:
        client = _client(self._run.address.uri)
        run_id, experiment_id = self._run.open(client)
        logged = self._logged_model(client, report, origin, run_id, experiment_id)
        record = TrackingRecord(
            uri=without_password(self._run.address.uri),
            run_id=run_id,
            experiment_id=experiment_id,
            model_id=logged.model_id,
        )
        tags = _tags(report, origin) | {f"{TAG_PREFIX}key": _key(report, run_id)}
        return register(client, self._options, record, logged, tags, last=last)

    def _logged_model(
        self,
        client: Any,
        report: ExportReport,
        origin: Provenance,
        run_id: str,
        experiment_id: str,
    ) -> Any:
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        key = _key(report, run_id)
        found = client.search_logged_models(
            [experiment_id], filter_string=f"tags.`{TAG_PREFIX}key` = '{key}'"
        )
        found = sorted(found, key=lambda model: model.status != LoggedModelStatus.READY)
        logged = (
            found[0]
            if found
            else client.create_logged_model(
                experiment_id,
                name=_legal_name(report),
                source_run_id=run_id,
                model_type="onnx",
                params=_params(report),
                tags=_tags(report, origin) | {f"{TAG_PREFIX}key": key},
            )
        )
        if logged.status == LoggedModelStatus.READY:
            return logged
        step = report.global_step or 0
        with already_there_is_fine():
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=step)])
        with tempfile.TemporaryDirectory(prefix="onnxport-") as temporary:
            folder = Path(temporary) / "model"
            package_model(report, folder, logged, run_id)
            for file in model_files_in_order(folder):
                with _fail_fast(REQUEST_TIMEOUT_S + file.stat().st_size // UPLOAD_BYTES_PER_S):
                    client.log_model_artifact(logged.model_id, str(file))
        self._log_metrics(client, report, logged, run_id)
        return client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)

    def _log_metrics(self, client: Any, report: ExportReport, logged: Any, run_id: str) -> None:
        """Link the points that the logger wrote, and log our own metrics.

        A metric of a model is written to the history of its run, too. A point with the same step,
        time and value is there already and changes nothing, so that the user's curves stay as they
        are. What the logger did not write becomes a tag, in a run of somebody else.
        """
        from mlflow.entities import Metric

        latest = {metric.key: metric for metric in client.get_run(run_id).data.to_proto().metrics}
        step = max((report.global_step or 0) - 1, 0)  # where Lightning logs for this checkpoint
        points = {
            "onnx/max_abs_error": report.max_abs_error or 0.0,
            "onnx/size_mb": Path(str(report.path)).stat().st_size / 2**20,
            "onnx/export_s": sum(
                s for stage, s in report.seconds.items() if stage not in {"total", "stall"}
            ),
        }
        linked: list[Metric] = []
        tags: dict[str, str] = {}
        for name, value in report.metrics.items():
            key = _metric_key(self._run.address.metric_prefix + name)
            point = latest.get(key)
            if point is not None and point.value != value:
                # Training went on while the model was made: its point is an earlier one.
                point = _point_at(client.get_metric_history(run_id, key), value, step)
            if point is not None:
                linked.append(
                    Metric(key, value, point.timestamp, point.step, model_id=logged.model_id)
                )
            elif self._run.started:
                points[key] = value
            else:
                tags[f"{TAG_PREFIX}metrics.{key}"] = repr(value)
        # The time is fixed, so that a repetition writes the same points.
        now = logged.creation_timestamp
        own = [Metric(key, points[key], now, step, model_id=logged.model_id) for key in points]
        client.log_batch(run_id, metrics=[*linked, *own])
        if tags:
            client.set_logged_model_tags(logged.model_id, tags)


def _point_at(history: Sequence[Any], value: float, step: int) -> Any:
    """Return the point of a metric that has a value, the nearest to a step; ``None``: none has."""
    points = [point for point in history if point.value == value]
    return min(points, key=lambda point: abs(point.step - step), default=None)


class _Run:
    """The run that models are logged to, started when the first of them comes if there is none.

    Args:
        address: Which run.

    Attributes:
        started: Whether it is ours.
    """

    def __init__(self, address: RunAddress) -> None:
        self.address = address
        self.started = False
        self._fit = uuid.uuid4().hex
        self._may_exist = False

    def open(self, client: Any) -> tuple[str, str]:
        """Return the ids of the run and of its experiment."""
        address = self.address
        if address.run_id is None or address.experiment_id is None:
            name = address.options.experiment
            found = client.get_experiment_by_name(name)
            if found is not None:
                experiment_id = found.experiment_id
            else:
                experiment_id = client.create_experiment(name, address.artifact_root)
            tag = f"{TAG_PREFIX}fit"
            begun = (
                client.search_runs([experiment_id], f"tags.`{tag}` = '{self._fit}'")
                if self._may_exist
                else []
            )
            self._may_exist = True
            run = begun[0] if begun else client.create_run(experiment_id, tags={tag: self._fit})
            run_id = run.info.run_id
            self.started = True
            self.address = replace(address, run_id=run_id, experiment_id=experiment_id)
            return str(run_id), str(experiment_id)
        return address.run_id, address.experiment_id


def _client(uri: str) -> Any:
    with optional_import(extra="mlflow", needed_for="MLflow tracking"):
        from mlflow import MlflowClient
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _fail_fast(timeout_s: int = REQUEST_TIMEOUT_S) -> Iterator[None]:
    """Bound how long MLflow's client may block; it reads these settings at each call.

    It also draws names and pauses from Python's random numbers, which are training's.
    """
    wanted = _ENVIRONMENT | {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}
    before = {name: os.environ.get(name) for name in wanted}
    numbers = random.getstate()
    os.environ.update(wanted)
    try:
        yield
    finally:
        random.setstate(numbers)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _key(report: ExportReport, run_id: str) -> str:
    """Tell models apart, also those of equal weights under equal names in two folders."""
    weights = (report.weights_sha256 or "")[:16]
    folder = hashlib.sha256(str(Path(str(report.path)).parent).encode()).hexdigest()[:8]
    return f"{run_id}:{report.global_step}:{_stem(report)}:{weights}:{folder}".replace("'", "_")


def _stem(report: ExportReport) -> str:
    return Path(str(report.path)).stem


def _legal_name(report: ExportReport) -> str:
    return re.sub(r"""[/:.%"']""", "_", _stem(report))


def _metric_key(key: str) -> str:
    """Clean a key as Lightning's ``MLFlowLogger`` does, so that both meet."""
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", key)


def _params(report: ExportReport) -> dict[str, str]:
    known = {
        "core": report.core,
        "opset": report.opset,
        "epoch": report.epoch,
        "global_step": report.global_step,
        "dynamic_axes": report.dynamic_axes,
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def _tags(report: ExportReport, origin: Provenance) -> dict[str, str]:
    known = {
        "validated": "true",
        "checkpoint": Path(report.checkpoint).name if report.checkpoint else None,
        "weights_sha256": report.weights_sha256,
        "providers": ",".join(sorted({check.provider for check in report.checks})),
        "max_abs_error": report.max_abs_error,
    }
    tags = {f"{TAG_PREFIX}{key}": str(value) for key, value in known.items() if value is not None}
    return tags | score_tags(score_of(origin))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
