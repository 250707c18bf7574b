"""Variants of a model as models of their own, which say whose children they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.tracking.base import identity_of
from onnxport.tracking.promotion import TAG_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxport.tracking.base import Model

__all__ = ["PARENT", "VARIANT", "VARIANTS", "child_place", "children_of", "places_of_children"]

VARIANT = f"{TAG_PREFIX}variant"
"""Tag of a child: which variant it is."""
PARENT = f"{TAG_PREFIX}parent"
"""Tag of a child: the logged model that it was made of."""
VARIANTS = f"{TAG_PREFIX}variants"
"""Tag of a parent: names of its children, written before there are any."""


def children_of(model: Model) -> Iterator[tuple[str, Model]]:
    """Yield each proven variant whose file is there, by name.

    Args:
        model: The parent.
    """
    for variant in model.report.variants:
        path = None if variant.path is None else model.path.with_name(Path(variant.path).name)
        identity = None if path is None else identity_of(path)
        if path is None or identity is None:
            continue
        report = replace(
            model.report,
            path=str(path),
            checks=variant.checks,
            metric_parity=variant.metric_parity,
            bytes=variant.bytes,
            placements=(),
            latencies=tuple(one for one in variant.latencies if one.name != "parent"),
            seconds={"variant": variant.seconds},
            variants=(),
        )
        place = child_place(model.place, variant.name)
        yield (
            variant.name,
            replace(model, path=path, place=place, report=report, identity=identity),
        )


def child_place(place: str, name: str) -> str:
    """Name the place of a variant."""
    return f"{place}-{name}"


def places_of_children(place: str, tags: Mapping[str, str]) -> list[str]:
    """Return where the variants of a logged model were made.

    Args:
        place: Where the parent was made.
        tags: Of the parent.
    """
    return [child_place(place, name) for name in tags.get(VARIANTS, "").split(",") if name]
