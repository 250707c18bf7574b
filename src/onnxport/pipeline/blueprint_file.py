"""A blueprint as a file, so that somebody without the module can fill in weights, and prove it.

The file holds plain values and tensors, as ``torch.save`` writes them, and is read with
``weights_only=True``: no code is stored and none runs when it is read.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import nn

from onnxport._archive import require_archive
from onnxport._files import MOST_BYTES
from onnxport.errors import ExportError
from onnxport.exporter.confined import tensors_in
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.frontier import Piece
from onnxport.exporter.ladder import named_rung
from onnxport.exporter.template import Slot, Template
from onnxport.exporter.writer import staging
from onnxport.inputs.dims import AxisPlan
from onnxport.pipeline.blueprint import Blueprint
from onnxport.pipeline.job import LiveReference
from onnxport.pipeline.open_template import OpenTemplate
from onnxport.pipeline.plan import Plan
from onnxport.report import ExportReport
from onnxport.signature import ModelSignature
from onnxport.tree import Example, flatten

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["load_blueprint", "read_plain", "reference_from", "reference_of", "save_blueprint"]

logger = logging.getLogger(__name__)

_FORMAT = 1
MOST_TEMPLATE_BYTES = 1 << 32
"""A graph has 2 GiB at most, and comes with an example of its inputs."""


def save_blueprint(blueprint: Blueprint | None, path: Path) -> bool:
    """Write a blueprint, if a model can be proven with it and without the module.

    That takes a run of the live module that says all, see :class:`LiveReference`. A disk that
    refuses is no reason to stop.

    Args:
        blueprint: The blueprint, or ``None``.
        path: Where to write; what is there goes in any case.

    Returns:
        Whether it was written.
    """
    try:
        if blueprint is None or blueprint.example is None or blueprint.plan.dtype is not None:
            path.unlink(missing_ok=True)
            return False
        with staging(path) as staged:
            torch.save(_plain(blueprint), staged)
            staged.replace(path)
    except Exception:  # a full disk, an example that is no plain tensor
        logger.debug("The template is not kept at %s.", path, exc_info=True)
        return False
    return True


def load_blueprint(path: Path) -> Blueprint:
    """Read what :func:`save_blueprint` wrote.

    Raises:
        ExportError: If the file is not there, is damaged, or is of another version.
    """
    try:
        return _blueprint(read_plain(path, MOST_TEMPLATE_BYTES))
    except Exception as error:  # a damaged file raises anything
        raise ExportError(
            f"The template {path} cannot be read: {type(error).__name__}: {error}."
        ) from error


def reference_of(reference: LiveReference | None, most_bytes: int) -> dict[str, Any] | None:
    """Return what a live module gave as plain values; ``None`` if it is too large to be kept."""
    if reference is None:
        return None
    inputs = _tensors_of(reference.example)
    size = sum(tensor.nbytes for tensor in (*inputs, *reference.outputs))
    if not reference.exact or size > most_bytes:
        return None
    return {
        "inputs": _alone(inputs),
        "outputs": _alone(reference.outputs),
        "rtol": reference.rtol,
        "target": reference.target,
    }


def reference_from(content: dict[str, Any]) -> LiveReference:
    """Return the reference that :func:`reference_of` has laid down."""
    return LiveReference(
        example=Example(tuple(content["inputs"]), {}),
        outputs=tuple(content["outputs"]),
        rtol=float(content["rtol"]),
        target=str(content["target"]),
        exact=True,
    )


def read_plain(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a file of plain values and tensors; nothing else is let in.

    Args:
        path: The file.
        most_bytes: How large it may be.

    Raises:
        Exception: Whatever a damaged file leads to.
    """
    require_archive(path, most_bytes)
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content


def _plain(blueprint: Blueprint) -> dict[str, Any]:
    template, plan, known = blueprint.template, blueprint.plan, blueprint.fingerprint
    return {
        "format": _FORMAT,
        "head": _as_tensor(template.head),
        "graph": _as_tensor(template.graph),
        "slots": [
            [slot.name, slot.elem_type, list(slot.dims), slot.source] for slot in template.slots
        ],
        "pieces": [
            {
                "model": _as_tensor(piece.model),
                "sources": list(piece.sources),
                "elem_types": list(piece.elem_types),
                "outputs": list(piece.outputs),
            }
            for piece in template.pieces
        ],
        "entries": {name: list(dims) for name, dims in template.entries.items()},
        "axes": {
            "inputs": [dict(dims) for dims in plan.axes.inputs],
            "outputs": [dict(dims) for dims in plan.axes.outputs],
            "batch": plan.axes.batch,
            "batches": list(plan.axes.batches),
            "independent": plan.axes.independent,
        },
        "example": _alone(_tensors_of(blueprint.example)),
        "rung": blueprint.rung.key,
        "noise": [float(noise) for noise in blueprint.noise],
        "fingerprint": json.dumps(None if known is None else dict(known)),
        "changes": dict(blueprint.changes),
        "schema": {name: list(shape) for name, shape in blueprint.schema.items()},
        "keeps_state": blueprint.keeps_state,
        "report": blueprint.report.to_json(),
        "metadata": json.dumps(dict(blueprint.metadata)),
    }


def _template(content: dict[str, Any]) -> Template:
    return Template(
        head=_as_bytes(content["head"]),
        graph=_as_bytes(content["graph"]),
        slots=tuple(
            Slot(name=name, elem_type=kind, dims=tuple(dims), source=source)
            for name, kind, dims, source in content["slots"]
        ),
        pieces=tuple(
            Piece(
                model=_as_bytes(piece["model"]),
                sources=tuple(piece["sources"]),
                elem_types=tuple(piece["elem_types"]),
                outputs=tuple(piece["outputs"]),
                made=(),
            )
            for piece in content["pieces"]
        ),
        entries={name: tuple(dims) for name, dims in content["entries"].items()},
    )


def _blueprint(content: dict[str, Any]) -> Blueprint:
    rung = named_rung("auto", content["rung"])
    if content["format"] != _FORMAT or rung is None:
        raise ExportError("another version of onnxport has written it")
    _require_self_contained(content)
    report = ExportReport.from_json(content["report"])
    example = Example(tuple(content["example"]), {})
    spec, _ = flatten((example.args, {}))
    axes = content["axes"]
    return Blueprint(
        opened=OpenTemplate(_template(content)),
        plan=Plan(
            root=nn.Module(),
            flat=FlatModule(nn.Module(), spec),
            calls=(example.args,),
            signature=ModelSignature(inputs=report.inputs, outputs=report.outputs),
            axes=AxisPlan(
                inputs=tuple(axes["inputs"]),
                outputs=tuple(axes["outputs"]),
                batch=axes["batch"],
                batches=tuple(axes["batches"]),
                independent=axes["independent"],
            ),
            warnings=(),
        ),
        spec=spec,
        keeps_state=content["keeps_state"],
        rung=rung,
        report=report,
        noise=content["noise"],
        schema={name: tuple(shape) for name, shape in content["schema"].items()},
        fingerprint=json.loads(content["fingerprint"]),
        example=example,
        metadata=json.loads(content["metadata"]),
        changes=Counter(content["changes"]),
    )


def _require_self_contained(content: dict[str, Any]) -> None:
    """Refuse graphs that would read other files.

    Raises:
        ExportError: If there is one.
    """
    graphs = [onnx.GraphProto.FromString(_as_bytes(content["graph"]))]
    graphs += [
        onnx.ModelProto.FromString(_as_bytes(each["model"])).graph for each in content["pieces"]
    ]
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_in(graphs)):
        raise ExportError("a graph in it refers to another file")


def _tensors_of(example: Example | None) -> Sequence[torch.Tensor]:
    if example is None:
        return ()
    return tuple(tensor for _, tensor in flatten((example.args, dict(example.kwargs)))[1])


def _alone(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors without what they are views of: that would be written, too."""
    return [tensor.detach().cpu().contiguous().clone() for tensor in tensors]


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0)


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())
