"""The seam where checkpoints are written and removed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from onnxport.callbacks.checkpoint_io import MirroredCheckpointIO


class Disk:
    """A checkpoint plugin that writes down what it is asked for."""

    kind = "disk"

    def __init__(self, events: list[Any], error: Exception | None = None) -> None:
        self.events = events
        self.error = error

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if self.error is not None:
            raise self.error
        self.events.append(("save", checkpoint, path, storage_options))

    def load_checkpoint(self, path: Any, map_location: Any = None) -> Any:
        self.events.append(("load", path, map_location))
        return {"state_dict": {}}

    def remove_checkpoint(self, path: Any) -> None:
        if self.error is not None:
            raise self.error
        self.events.append(("remove", path))


def mirrored(events: list[Any], error: Exception | None = None) -> MirroredCheckpointIO:
    mirror = MirroredCheckpointIO(Disk(events, error))
    mirror.listen(
        "a",
        lambda checkpoint, path: events.append(("saved", checkpoint, path)),
        lambda path: events.append(("removed", path)),
    )
    return mirror


def test_a_save_is_passed_on_unchanged_and_reported_after_it_was_done() -> None:
    events: list[Any] = []
    checkpoint = {"state_dict": {"w": 1}}
    mirrored(events).save_checkpoint(checkpoint, Path("a.ckpt"), storage_options={"fast": True})
    assert events == [
        ("save", checkpoint, Path("a.ckpt"), {"fast": True}),
        ("saved", checkpoint, "a.ckpt"),
    ]
    assert events[0][1] is checkpoint


def test_a_removal_is_passed_on_and_reported_after_it_was_done() -> None:
    events: list[Any] = []
    mirrored(events).remove_checkpoint(Path("a.ckpt"))
    assert events == [("remove", Path("a.ckpt")), ("removed", "a.ckpt")]


def test_what_failed_is_raised_and_not_reported() -> None:
    events: list[Any] = []
    broken = mirrored(events, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        broken.save_checkpoint({}, "a.ckpt")
    with pytest.raises(OSError, match="disk full"):
        broken.remove_checkpoint("a.ckpt")
    assert events == []


def test_everything_else_is_the_inner_plugins() -> None:
    events: list[Any] = []
    plugin = mirrored(events)
    assert plugin.kind == "disk"
    assert plugin.load_checkpoint("a.ckpt", map_location="cpu") == {"state_dict": {}}
    assert events == [("load", "a.ckpt", "cpu")]
    with pytest.raises(AttributeError, match="no attribute 'teardown'"):
        plugin.teardown()


def test_each_listener_is_told_once_also_when_it_listens_again() -> None:
    events: list[Any] = []
    plugin = mirrored(events)
    for name in ("b", "b", "c"):
        plugin.listen(
            name,
            lambda _, path, name=name: events.append((name, path)),  # type: ignore[misc]
            lambda path, name=name: events.append((name, path)),  # type: ignore[misc]
        )
    plugin.save_checkpoint({}, "x")
    plugin.remove_checkpoint("x")
    told = ["save", "saved", "b", "c", "remove", "removed", "b", "c"]
    assert [event[0] for event in events] == told


def test_mirrors_may_stand_one_in_another() -> None:
    events: list[Any] = []
    outer = MirroredCheckpointIO(mirrored(events))
    outer.listen("b", lambda _, path: events.append(("outer", path)), events.append)
    outer.save_checkpoint({}, "a.ckpt")
    assert [event[0] for event in events] == ["save", "saved", "outer"]


def test_a_mirror_can_be_copied() -> None:
    plugin = mirrored([])
    assert copy.copy(plugin).inner is plugin.inner
    assert copy.deepcopy(plugin).inner is not plugin.inner


def test_a_mirror_that_was_not_yet_filled_has_no_attributes() -> None:
    empty = object.__new__(MirroredCheckpointIO)
    with pytest.raises(AttributeError, match="inner"):
        empty.kind  # noqa: B018


def test_who_listens_is_told_before_anything_changes() -> None:
    events: list[Any] = []
    plugin = MirroredCheckpointIO(Disk(events, None))
    plugin.listen(
        "a",
        lambda _, path: events.append(("saved", path)),
        lambda path: events.append(("removed", path)),
        on_saving=lambda path: events.append(("saving", path)),
        on_removing=lambda path: events.append(("removing", path)),
    )
    plugin.save_checkpoint({}, "x")
    plugin.remove_checkpoint("x")
    told = ["saving", "save", "saved", "removing", "remove", "removed"]
    assert [event[0] for event in events] == told
