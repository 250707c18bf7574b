"""Tell tracking servers what an earlier training run could not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.errors import ConfigurationError
from onnxport.pipeline.report_files import read_report, save_report
from onnxport.report import TrackingRecord
from onnxport.tracking.courier import Courier
from onnxport.tracking.job import jobs_in, model_of, save_job

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from onnxport.report import ExportReport
    from onnxport.tracking.job import Job

__all__ = ["keep_record", "sync", "tell_server"]


def keep_record(model: Path, record: TrackingRecord) -> ExportReport | None:
    """Write what a server holds to the report beside a model; return the report."""
    report = read_report(model)
    if report is None:
        return None
    report = report.with_tracking(record)
    save_report(report, model)
    return report


def sync(
    folder: str | os.PathLike[str], tell: Callable[[Path, TrackingRecord], None] = lambda *_: None
) -> dict[Path, TrackingRecord]:
    """Tell tracking servers of the models that they were to be told of, and were not.

    A training run notes beside each model what its server should hold, and removes the note when
    the server holds it. What is left of a run that was killed, or whose server was down, is found
    here; what was begun is completed, and nothing is logged twice. Passwords are not in the notes:
    one that was part of the address is taken from ``MLFLOW_TRACKING_URI``, if the rest is the same.

    Args:
        folder: Where to look, and below.
        tell: Called with each model and what its server holds, as it comes.

    Returns:
        What the servers hold, by model; ``missing`` says what could not be done, and stays noted
        unless the note was damaged.

    Raises:
        ConfigurationError: If there is no such folder.

    Example:
        >>> import tempfile, onnxport
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     onnxport.sync(folder)  # nothing is left here
        {}
    """
    root = Path(folder).absolute()
    if not root.is_dir():
        found = f"{root} is a file" if root.exists() else f"There is no folder {root}"
        raise ConfigurationError(f"{found}. Give the folder of checkpoints.")
    return _carry_out(jobs_in([root]), tell)


def tell_server(
    jobs: Iterable[Job], tell: Callable[[Path, TrackingRecord], None] = lambda *_: None
) -> dict[Path, TrackingRecord]:
    """Note what servers should hold, and tell them; see :func:`sync`.

    Args:
        jobs: One per model.
        tell: As for :func:`sync`.

    Returns:
        As :func:`sync`; what could not be told stays noted for it.
    """
    noted, refused = [], {}
    for job in jobs:
        try:
            noted.append(save_job(job))
        except OSError as error:
            why = f"It could not be noted beside the model: {error}"
            refused[job.model] = TrackingRecord(uri=job.address.uri, missing=why)
    return refused | _carry_out(noted, tell)


def _carry_out(
    notes: Iterable[Path], tell: Callable[[Path, TrackingRecord], None]
) -> dict[Path, TrackingRecord]:
    courier, told = Courier(), {}
    for path in notes:
        carried = courier.carry_out(path)
        if carried.record is not None:
            model = model_of(path)
            if carried.record.uri:  # else it is not even known what it was about
                keep_record(model, carried.record)
            told[model] = carried.record
            tell(model, carried.record)
    return told
