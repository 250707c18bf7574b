"""What a tracker is: the pipeline's side of any tracking server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from onnxport.config import MLflow
from onnxport.report import TrackingRecord

if TYPE_CHECKING:
    from onnxport.report import ExportReport, Provenance

__all__ = ["RunAddress", "Tracker", "Unavailable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAddress:
    """Which run models belong to.

    Args:
        uri: Address of the server or database.
        run_id: The run; ``None``: start one.
        experiment_id: Its experiment; ``None`` together with ``run_id``.
        artifact_root: Where a new experiment keeps its artifacts; ``None``: the server's default.
        metric_prefix: What the logger puts before the names of metrics, separator included.
        options: Registry options.
    """

    uri: str
    run_id: str | None = None
    experiment_id: str | None = None
    artifact_root: str | None = None
    metric_prefix: str = ""
    options: MLflow = field(default_factory=MLflow)


class Tracker(Protocol):
    """Publishes proven models; never raises into training."""

    def publish(self, report: ExportReport, origin: Provenance, *, last: bool) -> TrackingRecord:
        """Bring one proven model to the server.

        Args:
            report: The report of a published model.
            origin: Its metrics, and which one decides what is best.
            last: Whether this is the best model at the end of training.

        Returns:
            What the server holds now; ``missing`` says what could not be done.
        """
        ...

    def named(self, suffix: str) -> Tracker:
        """Return a tracker to the same run for models of one name.

        Args:
            suffix: What follows the registered model's name; ``""`` gives the tracker itself.
        """
        ...

    def resume(self) -> None:
        """Training is over: a server that was down may be asked again."""
        ...

    def close(self, *, failed: bool) -> None:
        """End a run that the tracker itself started."""
        ...


class Unavailable:
    """Stands for a server whose address could not be found out.

    Args:
        reason: Why; it goes to each report.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def publish(self, report: ExportReport, origin: Provenance, *, last: bool) -> TrackingRecord:  # noqa: ARG002
        """Say that everything is missing."""
        return TrackingRecord(uri="", missing=self._reason)

    def named(self, suffix: str) -> Unavailable:  # noqa: ARG002
        """Return the same."""
        return self

    def resume(self) -> None:
        """Do nothing."""

    def close(self, *, failed: bool) -> None:
        """Do nothing."""
