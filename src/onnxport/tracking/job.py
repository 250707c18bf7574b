"""What is to be told to a tracking server, noted on the disk until it was told.

One small file beside each model says what the server should hold for it: the model, or, once its
checkpoint was removed, nothing. A newer wish replaces an older one. Whoever comes next can carry it
out: the process beside training, the next fit, or ``onnxport sync``.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxport._files import UNTOLD, hidden_below, replace_content
from onnxport.config import MLflow
from onnxport.report import ExportReport, Provenance
from onnxport.tracking.base import Model, RunAddress, without_password

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = [
    "Job",
    "address_from",
    "finish_job",
    "job_path",
    "jobs_in",
    "model_of",
    "plain_address",
    "read_job",
    "save_job",
]

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a tracking server should hold for the model in one place.

    Args:
        model: Where the model lies.
        place: Names where it was made.
        address: Which run it belongs to; a password is not written down.
        content: The model; ``None``: it was removed, and is to be removed from the server.
        last: Whether this is the best model at the end of training.
        ended: How the run has ended (``"FINISHED"``, ``"FAILED"``), if it is ours and has.
        token: Tells it from other jobs for the same model.
        attached: It is no model but a file to be shown with the run: its page.
    """

    model: Path
    place: str
    address: RunAddress
    content: Model | None = None
    last: bool = False
    ended: str | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    attached: bool = False


def job_path(model: Path) -> Path:
    """Return where the job of a model is noted."""
    return model.with_name(f".{model.name}{UNTOLD}")


def model_of(path: Path) -> Path:
    """Return the model that a job is about."""
    return path.with_name(path.name[1 : -len(UNTOLD)])


def save_job(job: Job) -> Path:
    """Note a job; an older one for the same model is replaced in one step.

    Raises:
        OSError: If the disk does not take it.
    """
    path = job_path(job.model)
    content = {
        "version": _VERSION,
        "place": job.place,
        "address": plain_address(job.address),
        "content": None if job.content is None else _encoded_model(job.content),
        "last": job.last,
        "ended": job.ended,
        "token": job.token,
        "attached": job.attached,
    }
    replace_content(path, json.dumps(content).encode())
    return path


def read_job(path: Path, text: bytes) -> Job:
    """Read a job.

    Args:
        path: Where it was noted.
        text: What the file holds.

    Raises:
        ValueError: If it is none of ours, or damaged.
    """
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        model = content["content"]
        lies, place = model_of(path), str(content["place"])
        if not re.fullmatch(r"[0-9a-f]{16}", place):  # it becomes part of a question to the server
            raise ValueError(f"place {place!r}")
        return Job(
            model=lies,
            place=place,
            address=address_from(content["address"]),
            content=None if model is None else _decoded_model(model, lies, place),
            last=bool(content["last"]),
            ended=content["ended"],
            token=content["token"],
            attached=content.get("attached") is True,
        )
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def plain_address(address: RunAddress) -> dict[str, Any]:
    """Return an address as plain values, without its password."""
    # It is written once; what the user gave as an option may hold a password, too.
    options = asdict(address.options) | {"tracking_uri": None}
    return asdict(address) | {"uri": without_password(address.uri), "options": options}


def address_from(content: Mapping[str, Any]) -> RunAddress:
    """Return the address that plain values tell."""
    return RunAddress(**{**content, "options": MLflow(**content["options"])})


def finish_job(path: Path, seen: os.stat_result) -> bool:
    """Remove a job that was carried out, unless another one has taken its place meanwhile.

    Args:
        path: The job.
        seen: The state of the file when it was read.

    Returns:
        Whether it was still the same.
    """
    try:
        now = path.stat()
    except FileNotFoundError:
        return True
    if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
        return False
    path.unlink(missing_ok=True)
    return True


def jobs_in(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the jobs in folders and below, in the order in which they were noted."""
    found: dict[Path, int] = {}
    for folder in folders:
        for path in hidden_below(folder, UNTOLD):
            try:
                found[path] = path.stat().st_mtime_ns
            except FileNotFoundError:  # carried out meanwhile
                continue
            except OSError:  # whoever carries it out will say what is wrong with it
                found[path] = 0
    yield from sorted(found, key=lambda path: (found[path], path))


def _encoded_model(model: Model) -> dict[str, Any]:
    metrics = {name: repr(value) for name, value in model.origin.metrics.items()}  # NaN: no JSON
    row = {} if model.row is None else model.row
    return {
        "report": model.report.to_json(),
        "origin": asdict(model.origin) | {"metrics": metrics},
        "identity": model.identity,
        "row": {name: _encoded_array(array) for name, array in row.items()},
    }


def _decoded_model(content: Mapping[str, Any], path: Path, place: str) -> Model:
    metrics = {name: float(value) for name, value in content["origin"]["metrics"].items()}
    size, time = content["identity"]
    return Model(
        path=path,
        place=place,
        report=ExportReport.from_json(content["report"]),
        origin=Provenance(**content["origin"] | {"metrics": metrics}),
        identity=(int(size), int(time)),
        row={name: _decoded_array(array) for name, array in content["row"].items()} or None,
    )


def _encoded_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": array.shape, "data": content}


def _decoded_array(content: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    raw = base64.b64decode(content["data"], validate=True)
    return np.frombuffer(raw, np.dtype(content["dtype"])).reshape(content["shape"])
