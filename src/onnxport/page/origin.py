"""What a model takes and gives, and where its weights came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxport.page.parts import Fact, Section, Table
from onnxport.page.wording import NOTHING, clipped, name_of, shape_text, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxport.page.run import RunHistory
    from onnxport.report import ExportReport, TrackingRecord

__all__ = ["interface", "origin"]

_SAID = {
    "version": "onnxport",
    "torch": "torch",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
}


def interface(run: RunHistory) -> Section:
    """List inputs and outputs, and why which of their axes are dynamic."""
    shown = run.with_most("inputs", "outputs")
    if shown is None:
        return Section(
            name="interface", title="Inputs and outputs", missing="No checkpoint got that far."
        )
    kinds = [("input", each) for each in shown.inputs] + [
        ("output", each) for each in shown.outputs
    ]
    tables = [
        Table(
            caption="Names, types and shapes",
            columns=("name", "is", "dtype", "shape"),
            rows=tuple(
                (clipped(each.name, 80), kind, clipped(each.dtype, 40), shape_text(each.shape))
                for kind, each in kinds
            ),
            words=frozenset({1, 2, 3}),
            at_once=40,
        )
    ]
    if shown.evidence:
        tables.append(
            Table(
                caption="Why axes are dynamic",
                columns=("dimension", "evidence", "in words"),
                rows=tuple(
                    (clipped(e.dim, 60), clipped(e.kind, 60), clipped(e.text, 1000))
                    for e in shown.evidence
                ),
                words=frozenset({1, 2}),
                at_once=40,
            )
        )
    of = (
        f"Of {name_of(shown)}."
        if shown.ok
        else f"As they were seen before {name_of(shown)} failed."
    )
    return Section(name="interface", title="Inputs and outputs", lead=of, tables=tuple(tables))


def origin(run: RunHistory, metadata: Mapping[str, str]) -> Section:
    """Say of which checkpoint the shown model is, and what has made it.

    Args:
        run: The run.
        metadata: What the model's file says of itself, or nothing.
    """
    shown = run.shown
    if shown is None:
        missing = "No checkpoint has a model."
        return Section(name="origin", title="Where the weights come from", missing=missing)
    facts = [*_of_report(run, shown), *_versions(metadata), *_of_server(shown.tracking)]
    return Section(
        name="origin",
        title="Where the weights come from",
        lead=f"Of {name_of(shown)}, as its report has it, and its file.",
        facts=tuple(fact for fact in facts if fact.text),
    )


def _of_report(run: RunHistory, shown: ExportReport) -> list[Fact]:
    size = run.size_of(shown)
    how = {"export": "exported", "refresh": "the graph of an earlier checkpoint, these weights"}
    return [
        Fact(name="model", text=clipped(shown.path or "", 400)),
        Fact(name="checkpoint", text=clipped(shown.checkpoint or "", 400)),
        Fact(name="weights, SHA-256", text=clipped(shown.weights_sha256 or "", 80)),
        Fact(name="epoch", text=_number(shown.epoch)),
        Fact(name="step", text=_number(shown.global_step)),
        Fact(name="what was exported", text=clipped(shown.target, 200) or "the whole module"),
        Fact(name="made", text=f"{how[shown.how]}, by {clipped(shown.core or NOTHING, 40)}"),
        Fact(name="opset", text=_number(shown.opset)),
        Fact(name="size", text="" if size is None else size_text(size)),
    ]


def _versions(metadata: Mapping[str, str]) -> list[Fact]:
    found = [
        f"{name} {clipped(metadata[key], 40)}" for key, name in _SAID.items() if metadata.get(key)
    ]
    return [Fact(name="versions", text=", ".join(found))]


def _of_server(record: TrackingRecord | None) -> list[Fact]:
    if record is None:
        return []
    version = (
        f"{record.registered_name}, version {record.version}" if record.registered_name else ""
    )
    return [
        Fact(name="tracking server", text=clipped(record.uri, 200)),
        Fact(name="run", text=clipped(record.run_id or "", 80)),
        Fact(name="logged model", text=clipped(record.model_id or "", 80)),
        Fact(name="registered", text=clipped(version, 200)),
        Fact(name="alias", text=clipped(record.alias or "", 80)),
    ]


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
