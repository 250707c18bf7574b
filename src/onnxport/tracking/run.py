"""The run of MLflow that models are logged to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxport.tracking.promotion import TAG_PREFIX
from onnxport.tracking.versions import already_there_is_fine

if TYPE_CHECKING:
    from onnxport.tracking.base import RunAddress

__all__ = ["Run"]

_FIT = f"{TAG_PREFIX}fit"
"""Tag of a run of our own: which training it belongs to."""


class Run:
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
