"""Every reader of a file that somebody else may have written, and what it may raise."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faults.catalogue import Site
from faults.leftovers import IMPATIENT, WaitsForFirst
from onnxport import MLflow
from onnxport.callbacks.owed import owed
from onnxport.errors import OnnxportError
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.confined import require_confined
from onnxport.exporter.memory import RungMemory
from onnxport.exporter.model_file import mapped_twin
from onnxport.exporter.ownership import is_our_report, read_metadata
from onnxport.pipeline.blueprint_file import load_blueprint
from onnxport.pipeline.report_files import read_report
from onnxport.tracking.job import read_job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["PARSERS", "Parser", "seeds"]


@dataclass(frozen=True)
class Parser:
    """A reader.

    Args:
        seeds: Pattern of files that it reads well.
        read: Reads a file.
        name: Of the file that is read.
        raises: What it may raise; all else is a fault.
    """

    seeds: str
    read: Callable[[Path], Any]
    name: str
    raises: tuple[type[Exception], ...] = ()

    def run(self, content: bytes, folder: Path) -> None:
        """Read such a file.

        Args:
            content: What it holds.
            folder: Where to lay it.
        """
        file = folder / self.name
        file.write_bytes(content)
        with suppress(*self.raises):
            self.read(file)


def _owed(file: Path) -> None:
    (file.parent / "m.ckpt").touch()
    list(owed([file.parent]))


def _report_of(file: Path) -> None:
    read_report(file.with_suffix(""))


def _job(file: Path) -> None:
    read_job(file, file.read_bytes())


def _recall(file: Path) -> None:
    RungMemory(file.parent).recall("key", "auto")


PARSERS = {
    "metadata of a model": Parser("*.onnx", read_metadata, "a.onnx"),
    "a model's places of weights": Parser("*.onnx", mapped_twin, "a.onnx", (OnnxportError,)),
    "a model of anybody": Parser("*.onnx", require_confined, "a.onnx", (OnnxportError,)),
    "whose a report is": Parser("*.json", is_our_report, "a.onnx.json"),
    "a report": Parser("*.json", _report_of, "a.onnx.json"),
    "a job for the server": Parser(".*.tracking", _job, ".m.onnx.tracking", (ValueError,)),
    "a note of what is owed": Parser(".*.pending", _owed, ".m.onnx.pending"),
    "a template": Parser(
        ".*.onnxport-template", load_blueprint, "t.onnxport-template", (OnnxportError,)
    ),
    "a checkpoint": Parser("*.ckpt", read_state_dict, "m.ckpt", (OnnxportError,)),
    "the memory of rungs": Parser("*.rung", _recall, "key-auto.json"),
}


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Train twice, so that there are files of all kinds; return what they hold.

    Args:
        folder: An empty folder.
    """
    told, owing = (Site(folder / name, random.Random(0)) for name in "ab")  # noqa: S311
    server = MLflow(tracking_uri="http://127.0.0.1:9", register="m")
    told.train(export=told.export(background=False, mlflow=server))
    owing.train(WaitsForFirst(owing), export=owing.export(background=IMPATIENT))
    (folder / "a.rung").write_text('{"rung": "trace"}')
    found = {
        name: [file.read_bytes() for file in sorted(folder.rglob(parser.seeds))]
        for name, parser in PARSERS.items()
    }
    assert all(found.values()), {name: len(files) for name, files in found.items()}
    return found
