"""MLflow: one logged model per proven checkpoint, versions and an alias in the registry.

Only ``MlflowClient`` is used: the fluent API would end the trainer's run, or log to experiment 0.
Each step looks before it creates, so that it can be repeated after any failure; a model becomes
READY only when all its files are there.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from onnxport._optional import optional_import
from onnxport.errors import TrackingError
from onnxport.report import TrackingRecord
from onnxport.tracking.base import without_password
from onnxport.tracking.marks import mark
from onnxport.tracking.package import DATA_SUFFIX, model_files_in_order, package_model
from onnxport.tracking.promotion import TAG_PREFIX, score_of, score_tags
from onnxport.tracking.reachable import require_reachable
from onnxport.tracking.registry import already_there_is_fine, has_version, register

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxport.report import ExportReport
    from onnxport.tracking.base import Model, RunAddress

__all__ = ["HASTY", "PATIENT", "MlflowTracker", "Patience", "require_mlflow"]

UPLOAD_BYTES_PER_S = 10_000_000
"""How fast it must take files."""
OPEN_LIMIT_S = 60.0
"""How long another process may take to make the tables of a database."""
_OPENED: set[str] = set()
_FIT = f"{TAG_PREFIX}fit"
"""Tag of a run of our own: which training it belongs to."""
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


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may take.

    Args:
        health_s: For a sign of life.
        request_s: For each answer after that; files get longer.
    """

    health_s: float
    request_s: int


HASTY = Patience(0.7, 2)
"""In a process that trains: a server is waited for at most twice a fit."""
PATIENT = Patience(5.0, 30)


class MlflowTracker:
    """Publishes to one run; raises whatever MLflow, its store and its transport raise.

    Args:
        address: Which run; one is started at the first model when there is none.
        patience: How long its server may take.
    """

    def __init__(self, address: RunAddress, patience: Patience = PATIENT) -> None:
        self._patience = patience
        self._options = address.options
        self._run = _Run(address)

    def publish(self, model: Model, *, last: bool) -> TrackingRecord:
        """Bring one proven model to the server; what an earlier call has begun is completed.

        Args:
            model: The model.
            last: Whether this is the best model at the end of training.

        Raises:
            ModelChangedError: If the file is not, or not any more, what was proven.
            TrackingError: If the server gives no sign of life.
        """
        model.require_unchanged()
        require_reachable(self._run.uri, self._patience.health_s)
        with _fail_fast(self._patience.request_s):
            client = _client(self._run.uri)
            run_id, experiment_id = self._run.open(client)
            logged = self._logged_model(client, model)
            record = TrackingRecord(
                uri=without_password(self._run.uri),
                run_id=run_id,
                experiment_id=experiment_id,
                model_id=logged.model_id,
            )
            tags = _tags(model) | {f"{TAG_PREFIX}key": _key(model, run_id)}
            return register(client, self._options, record, logged, tags, last=last)

    def remove(self, place: str) -> None:
        """Remove the logged models of a model that was removed, but those with a version.

        Args:
            place: Where it was made.

        Raises:
            TrackingError: If the server gives no sign of life.
        """
        require_reachable(self._run.uri, self._patience.health_s)
        with _fail_fast(self._patience.request_s):
            client = _client(self._run.uri)
            if self._run.find(client) is None:
                return  # nothing was ever told
            for logged in self._at(client, place):
                self._delete(client, logged)

    def close(self, status: str) -> None:
        """End the run if it is ours; the run of a logger is never touched.

        Args:
            status: ``"FINISHED"`` or ``"FAILED"``.

        Raises:
            TrackingError: If the server gives no sign of life.
        """
        if not self._run.ours:
            return
        require_reachable(self._run.uri, self._patience.health_s)
        with _fail_fast(self._patience.request_s):
            client = _client(self._run.uri)
            run_id = self._run.find(client)
            if run_id is not None:
                client.set_terminated(run_id, status)

    # --- steps ------------------------------------------------------------------------------

    def _at(self, client: Any, place: str) -> list[Any]:
        """Return the logged models of one place in this run, the READY ones first, then by age."""
        from mlflow.entities import LoggedModelStatus

        run_id, experiment_id = self._run.open(client)
        found = client.search_logged_models(
            [experiment_id], filter_string=f"tags.`{TAG_PREFIX}place` = '{place}'"
        )
        return sorted(
            (each for each in found if each.source_run_id == run_id),
            key=lambda each: (each.status != LoggedModelStatus.READY, each.creation_timestamp),
        )

    def _logged_model(self, client: Any, model: Model) -> Any:
        from mlflow.entities import LoggedModelStatus

        run_id, experiment_id = self._run.open(client)
        key = _key(model, run_id)
        found = self._at(client, model.place)
        same = [each for each in found if each.tags.get(f"{TAG_PREFIX}key") == key]
        logged = (
            same[0]
            if same
            else client.create_logged_model(
                experiment_id,
                name=_legal_name(model),
                source_run_id=run_id,
                model_type="onnx",
                params=_params(model.report),
                tags=_tags(model) | {f"{TAG_PREFIX}key": key, f"{TAG_PREFIX}place": model.place},
            )
        )
        if logged.status != LoggedModelStatus.READY:
            logged = self._fill(client, model, logged, run_id)
        for other in found:  # of an older file under this name, or twins of a lost answer
            if other.model_id != logged.model_id:
                self._delete(client, other)
        mark(client, logged, run_id, model)
        return logged

    def _fill(self, client: Any, model: Model, logged: Any, run_id: str) -> Any:
        """Give a logged model everything it should have; who sees it READY sees it whole."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        step = model.report.global_step or 0
        with already_there_is_fine():
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=step)])
        with tempfile.TemporaryDirectory(prefix="onnxport-") as temporary:
            folder = Path(temporary) / "model"
            package_model(model, folder, logged, run_id)
            *files, marker = model_files_in_order(folder)
            size = sum(file.stat().st_size for file in files)
            with _fail_fast(self._patience.request_s + size // UPLOAD_BYTES_PER_S):
                marker = marker.rename(Path(temporary) / marker.name)
                client.log_model_artifacts(logged.model_id, str(folder))
                client.log_model_artifact(logged.model_id, str(marker))
        model.require_unchanged()
        self._log_metrics(client, model, logged, run_id)
        return client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)

    def _delete(self, client: Any, logged: Any) -> None:
        if not has_version(client, logged):
            client.delete_logged_model(logged.model_id)

    def _log_metrics(self, client: Any, model: Model, logged: Any, run_id: str) -> None:
        """Link the points that the logger wrote, and log our own metrics.

        A metric of a model is written to the history of its run, too. A point with the same step,
        time and value is there already and changes nothing, so that the user's curves stay as they
        are. What the logger did not write becomes a tag, in a run of somebody else.
        """
        from mlflow.entities import Metric

        report = model.report
        latest = {metric.key: metric for metric in client.get_run(run_id).data.to_proto().metrics}
        step = max((report.global_step or 0) - 1, 0)  # where Lightning logs for this checkpoint
        points = {
            "onnx/max_abs_err": report.max_abs_error or 0.0,
            "onnx/latency_ms_p50": _latency_ms(report),
            "onnx/size_mb": _size_of(model.path) / 2**20,
            "onnx/export_s": sum(
                s for stage, s in report.seconds.items() if stage not in {"total", "stall"}
            ),
        }
        linked: list[Metric] = []
        tags: dict[str, str] = {}
        for name, value in report.metrics.items():
            key = _metric_key(self._run.metric_prefix + name)
            point = latest.get(key)
            if point is not None and point.value != value:
                # Training went on while the model was made: its point is an earlier one.
                point = _point_at(client.get_metric_history(run_id, key), value, step)
            if point is not None:
                linked.append(
                    Metric(key, value, point.timestamp, point.step, model_id=logged.model_id)
                )
            elif self._run.ours:
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
        uri: Address of the server or database.
        metric_prefix: What the logger puts before the names of metrics.
        ours: Whether no logger has started it.
    """

    def __init__(self, address: RunAddress) -> None:
        self.uri, self.metric_prefix = address.uri, address.metric_prefix
        self.ours = address.run_id is None or address.experiment_id is None
        self._address = address
        self._known: tuple[str, str] | None = None
        if address.run_id is not None and address.experiment_id is not None:
            self._known = address.run_id, address.experiment_id

    def open(self, client: Any) -> tuple[str, str]:
        """Return the ids of the run and of its experiment; both are made if they are not there."""
        if self._known is None:
            name, root = self._address.options.experiment, self._address.artifact_root
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                with already_there_is_fine():  # another process was faster
                    client.create_experiment(name, root)
                experiment = client.get_experiment_by_name(name)
            run_id = self.find(client)
            if run_id is None:
                tags = {_FIT: self._address.fit}
                run_id = client.create_run(experiment.experiment_id, tags=tags).info.run_id
            self._known = str(run_id), str(experiment.experiment_id)
        return self._known

    def find(self, client: Any) -> str | None:
        """Return the id of the run, if there is one."""
        if self._known is not None:
            return self._known[0]
        experiment = client.get_experiment_by_name(self._address.options.experiment)
        if experiment is None:
            return None
        wanted = f"tags.`{_FIT}` = '{self._address.fit}'"
        found = client.search_runs([experiment.experiment_id], wanted, order_by=["start_time ASC"])
        return str(found[0].info.run_id) if found else None


def _client(uri: str) -> Any:
    """Return a client; the first one to a database makes its tables, alone.

    Two processes that make them at once get in each other's way, and leave a database that nobody
    can use.

    Raises:
        TrackingError: If another process is at it for long.
    """
    with optional_import(extra="mlflow", needed_for="MLflow tracking"):
        from mlflow import MlflowClient
    if uri not in _OPENED and not uri.startswith("http"):
        user = getattr(os, "getuid", int)()  # a lock of somebody else's cannot be taken
        name = hashlib.sha256(f"{user} {uri}".encode()).hexdigest()[:16]
        lock = Path(tempfile.gettempdir()) / f"onnxport-{name}.lock"
        try:
            with FileLock(lock, OPEN_LIMIT_S):
                MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        except Timeout as error:
            raise TrackingError("another process has been opening it for long") from error
        _OPENED.add(uri)
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _fail_fast(timeout_s: int) -> Iterator[None]:
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


def _key(model: Model, run_id: str) -> str:
    """Tell models apart, also those of equal weights in two places."""
    weights = (model.report.weights_sha256 or "")[:16]
    return f"{run_id}:{model.report.global_step}:{weights}:{model.place}"


def _legal_name(model: Model) -> str:
    return re.sub(r"""[/:.%"']""", "_", Path(str(model.report.path)).stem)


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


def _tags(model: Model) -> dict[str, str]:
    report = model.report
    known = {
        "validated": "true",
        "checkpoint": Path(report.checkpoint).name if report.checkpoint else None,
        "weights_sha256": report.weights_sha256,
        "providers": ",".join(sorted({check.provider for check in report.checks})),
        "max_abs_error": report.max_abs_error,
    }
    tags = {f"{TAG_PREFIX}{key}": str(value) for key, value in known.items() if value is not None}
    return tags | score_tags(score_of(model.origin))


def _size_of(path: Path) -> int:
    files = (path, path.with_name(path.name + DATA_SUFFIX))
    return sum(file.stat().st_size for file in files if file.exists())


def _latency_ms(report: ExportReport) -> float:
    """Return the median of the proof's runs of the fewest rows on the CPU."""
    runs = [check for check in report.checks if check.provider == "CPUExecutionProvider"]
    runs = runs or list(report.checks)
    fewest = min((prod(check.sizes.values()) for check in runs), default=0)
    return 1000 * median(
        [check.seconds for check in runs if prod(check.sizes.values()) == fewest] or [0.0]
    )
