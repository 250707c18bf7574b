"""MLflow: one logged model per proven checkpoint, versions and an alias in the registry.

Only ``MlflowClient`` is used: the fluent API would end the trainer's run, or log to experiment 0.
Each step looks before it creates, so that it can be repeated after any failure; a model becomes
READY only when all its files are there.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from onnxport._files import require_inside, size_of_model
from onnxport._optional import optional_import
from onnxport.errors import TrackingError
from onnxport.report import TrackingRecord
from onnxport.tracking.base import ModelChangedError, without_password
from onnxport.tracking.children import (
    PARENT,
    VARIANT,
    VARIANTS,
    children_of,
    places_of_children,
)
from onnxport.tracking.description import (
    key_of,
    log_metrics,
    name_of,
    params_of,
    tags_of,
)
from onnxport.tracking.marks import mark
from onnxport.tracking.package import model_files_in_order, package_model, weights_of
from onnxport.tracking.promotion import TAG_PREFIX
from onnxport.tracking.reachable import require_reachable
from onnxport.tracking.registry import KEY, register
from onnxport.tracking.run import Run
from onnxport.tracking.versions import already_there_is_fine, has_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxport.tracking.base import Model, RunAddress

__all__ = ["HASTY", "PATIENT", "MlflowTracker", "Patience", "require_mlflow"]

UPLOAD_BYTES_PER_S = 10_000_000
"""How fast it must take files."""
OPEN_LIMIT_S = 60.0
"""How long another process may take to make the tables of a database."""
_OPENED: set[str] = set()
_ENVIRONMENT = {
    # Seconds, not the default 247 s; and no retries of creates, which would duplicate models.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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
        self._run = Run(address)

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
            children = self._children(client, model, logged)
            record = replace(record, variants=children)
            tags = tags_of(model) | {KEY: key_of(model, run_id)}
            with ThreadPoolExecutor(1) as beside:
                marked = beside.submit(mark, client, logged, run_id, model)
                record = register(client, self._options, record, logged, tags, last=last)
                marked.result()
            return record

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
                self._delete(client, logged, place)

    def attach(self, file: Path) -> None:
        """Log a file as an artifact of the run, if there is one.

        Args:
            file: The file; one that is gone, or a link out of its folder, is not shown.

        Raises:
            ModelChangedError: If it is gone.
            TrackingError: If the server gives no sign of life.
            UnsafeFileError: If it is a link out of its folder.
        """
        if not file.exists():
            raise ModelChangedError(f"{file} is not there any more.")
        require_inside(file)
        require_reachable(self._run.uri, self._patience.health_s)
        with _fail_fast(self._patience.request_s + file.stat().st_size // UPLOAD_BYTES_PER_S):
            client = _client(self._run.uri)
            run_id = self._run.find(client)
            if run_id is not None:
                client.log_artifact(run_id, str(file))

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

    def _children(self, client: Any, model: Model, parent: Any) -> dict[str, str]:
        """Bring the variants of a model; return the logged model of each.

        A parent with a version keeps its children, as it stays itself.
        """
        children = dict(children_of(model))
        names = ",".join(children)
        if names != parent.tags.get(VARIANTS, ""):  # first: whoever removes the parent must know
            client.set_logged_model_tags(parent.model_id, {VARIANTS: names})
        return {
            name: self._logged_model(
                client, child, {VARIANT: name, PARENT: parent.model_id}
            ).model_id
            for name, child in children.items()
        }

    def _logged_model(
        self, client: Any, model: Model, more: Mapping[str, str] | None = None
    ) -> Any:
        """Return a READY logged model; what is missing is made.

        Args:
            client: MLflow's client.
            model: The model.
            more: Further tags.
        """
        from mlflow.entities import LoggedModelStatus

        run_id, experiment_id = self._run.open(client)
        key = key_of(model, run_id)
        found = self._at(client, model.place)
        same = [each for each in found if each.tags.get(KEY) == key]
        logged = (
            same[0]
            if same
            else client.create_logged_model(
                experiment_id,
                name=name_of(model),
                source_run_id=run_id,
                model_type="onnx",
                params=params_of(model.report),
                tags=tags_of(model)
                | {KEY: key, f"{TAG_PREFIX}place": model.place}
                | dict(more or {}),
            )
        )
        if logged.status != LoggedModelStatus.READY:
            logged = self._fill(client, model, logged)
        for other in found:  # of an older file under this name, or twins of a lost answer
            if other.model_id != logged.model_id:
                self._delete(client, other, model.place)
        return logged

    def _fill(self, client: Any, model: Model, logged: Any) -> Any:
        """Give a logged model everything it should have; who sees it READY sees it whole."""
        from mlflow.entities import LoggedModelStatus

        seconds = self._patience.request_s + size_of_model(model.path) // UPLOAD_BYTES_PER_S
        with (
            tempfile.TemporaryDirectory(prefix="onnxport-") as folder,
            _fail_fast(seconds),
            ThreadPoolExecutor(1) as beside,
        ):
            # The weights take longest: all else is there by then, but what makes the model whole.
            rest = beside.submit(self._describe, client, model, logged, Path(folder) / "model")
            source, name = weights_of(model.path)
            weights = Path(folder) / name
            weights.symlink_to(source)
            client.log_model_artifact(logged.model_id, str(weights))
            client.log_model_artifact(logged.model_id, str(rest.result()))
        model.require_unchanged()
        return client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)

    def _describe(self, client: Any, model: Model, logged: Any, folder: Path) -> Path:
        """Bring everything but the weights; return the file that is to come last."""
        from mlflow.entities import LoggedModelOutput

        (run_id, _), step = self._run.open(client), model.report.global_step or 0
        package_model(model, folder, logged, run_id)
        *files, marker = model_files_in_order(folder)
        for file in files:
            if file.name != weights_of(model.path)[1]:
                client.log_model_artifact(logged.model_id, str(file))
        with already_there_is_fine():
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=step)])
        log_metrics(client, model, logged, self._run)
        return marker

    def _delete(self, client: Any, logged: Any, place: str) -> None:
        if has_version(client, logged):
            return
        for child_place in places_of_children(place, logged.tags):
            for child in self._at(client, child_place):
                if child.tags.get(PARENT) == logged.model_id:
                    client.delete_logged_model(child.model_id)
        client.delete_logged_model(logged.model_id)


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
