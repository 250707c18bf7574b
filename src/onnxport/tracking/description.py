"""What MLflow shows of a model: its name, parameters, tags and metrics."""

from __future__ import annotations

import hashlib
import posixpath
import re
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any

from onnxport._files import size_of_model
from onnxport.report import known_as
from onnxport.tracking.children import VARIANT
from onnxport.tracking.promotion import TAG_PREFIX, score_of, score_tags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxport.report import ExportReport
    from onnxport.tracking.base import Model
    from onnxport.tracking.run import Run

__all__ = ["key_of", "log_metrics", "name_of", "params_of", "tags_of"]


_CPU = "CPUExecutionProvider"
_LONGEST_KEY = 250
_LONGEST_VALUE = 6000
"""Characters that MLflow takes. Source: ``mlflow.utils.validation``, 3.17."""


def key_of(model: Model, run_id: str) -> str:
    """Tell models apart, also those of equal weights in two places."""
    weights = (model.report.weights_sha256 or "")[:16]
    return f"{run_id}:{model.report.global_step}:{weights}:{model.place}"


def name_of(model: Model) -> str:
    """Return the name of a logged model: that of its file, in what characters MLflow takes."""
    return re.sub(r"[^\w ,=+@()-]", "_", known_as(str(model.report.path), suffix=False))


def params_of(report: ExportReport) -> dict[str, str]:
    """Return the parameters of a logged model."""
    known = {
        "core": report.core,
        "opset": report.opset,
        "epoch": report.epoch,
        "global_step": report.global_step,
        "dynamic_axes": report.dynamic_axes,
    }
    return {key: str(value)[:_LONGEST_VALUE] for key, value in known.items() if value is not None}


def tags_of(model: Model) -> dict[str, str]:
    """Return the tags of a logged model, and of a version of it."""
    report = model.report
    known = {
        "validated": "true",
        "checkpoint": known_as(report.checkpoint) if report.checkpoint else None,
        "weights_sha256": report.weights_sha256,
        "providers": ",".join(sorted({check.provider for check in report.checks})),
        "max_abs_error": report.max_abs_error,
    }
    tags = {f"{TAG_PREFIX}{key}": str(value) for key, value in known.items() if value is not None}
    return tags | score_tags(score_of(model.origin, report.metric_parity))


def log_metrics(client: Any, model: Model, logged: Any, run: Run) -> None:
    """Link the points that the logger wrote, and log our own metrics.

    A metric of a model is written to the history of its run, too. A point with the same step,
    time and value is there already and changes nothing, so that the user's curves stay as they
    are. What the logger did not write becomes a tag, in a run of somebody else.

    Args:
        client: MLflow's client.
        model: The model.
        logged: MLflow's entity of the logged model.
        run: The run that it belongs to.
    """
    from mlflow.entities import Metric

    (run_id, _), report = run.open(client), model.report
    latest = {metric.key: metric for metric in client.get_run(run_id).data.to_proto().metrics}
    step = max((report.global_step or 0) - 1, 0)  # where Lightning logs for this checkpoint
    ours = f"onnx/{logged.tags[VARIANT]}/" if VARIANT in logged.tags else "onnx/"
    points = {
        f"{ours}max_abs_err": report.max_abs_error or 0.0,
        f"{ours}latency_ms_p50": _latency_ms(report),
        f"{ours}size_mb": size_of_model(model.path) / 2**20,
        f"{ours}export_s": sum(
            s for stage, s in report.seconds.items() if stage not in {"total", "stall", "latency"}
        ),
    }
    points |= _latency_points(report, ours)
    if report.metric_parity is not None:
        for pair in report.metric_parity.metrics:
            points[_metric_key(f"{ours}{run.metric_prefix}{pair.name}")] = pair.onnx
    linked: list[Metric] = []
    tags: dict[str, str] = {}
    for name, value in report.metrics.items():
        key = _metric_key(run.metric_prefix + name)
        point = latest.get(key)
        if point is not None and point.value != value:
            # Training went on while the model was made: its point is an earlier one.
            point = _point_at(client.get_metric_history(run_id, key), value, step)
        if point is not None:
            linked.append(Metric(key, value, point.timestamp, point.step, model_id=logged.model_id))
        elif run.ours:
            points[key] = value
        else:
            tags[f"{TAG_PREFIX}metrics.{key}"] = repr(value)
    # The time is fixed, so that a repetition writes the same points.
    now = logged.creation_timestamp
    own = [Metric(key, points[key], now, step, model_id=logged.model_id) for key in points]
    client.log_batch(run_id, metrics=[*linked, *own])
    if tags:
        client.set_logged_model_tags(logged.model_id, tags)


def _metric_key(key: str) -> str:
    """Clean a key as Lightning's ``MLFlowLogger`` does, so that both meet.

    What MLflow refuses then, because it would be the path of another file, is too long or empty,
    gets a hash. Source: ``mlflow.utils.validation``, 3.17.
    """
    cleaned = re.sub(r"[^a-zA-Z0-9_/. -]+", "", key)
    plain = cleaned == posixpath.normpath(cleaned) and not re.match(r"/|\.\.|\.$", cleaned)
    if plain and len(cleaned) <= _LONGEST_KEY:
        return cleaned
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-zA-Z0-9_-]+', '_', cleaned)[:200]}-{digest}".lstrip("-")


def _point_at(history: Sequence[Any], value: float, step: int) -> Any:
    """Return the point of a metric that has a value, the nearest to a step; ``None``: none has."""
    points = [point for point in history if point.value == value]
    return min(points, key=lambda point: abs(point.step - step), default=None)


def _latency_ms(report: ExportReport) -> float:
    """Return the median of the proof's runs of the fewest rows on the CPU."""
    runs = [check for check in report.checks if check.provider == _CPU]
    runs = runs or list(report.checks)
    fewest = min((prod(check.sizes.values()) for check in runs), default=0)
    return 1000 * median(
        [check.seconds for check in runs if prod(check.sizes.values()) == fewest] or [0.0]
    )


def _latency_points(report: ExportReport, prefix: str = "onnx/") -> dict[str, float]:
    """Return the medians that were measured, in ms; the name of the way is left out for the CPU."""
    return {
        f"{prefix}latency_ms_b{one.batch}"
        + ("" if one.name == _CPU else f"_{one.name.removesuffix('ExecutionProvider').lower()}"): (
            1000 * one.p50
        )
        for one in report.latencies
    }
