"""The short form: some kinds of fault of each area, each injected once; the rest: `make faults`."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest

from faults import registered
from faults.catalogue import Site
from faults.disk import why_not

if TYPE_CHECKING:
    from pathlib import Path

    from faults.catalogue import Fault

pytestmark = [
    pytest.mark.integration,
    pytest.mark.worker,
    pytest.mark.filterwarnings("ignore"),  # users' modules warn, and raise in __del__
]

EVERY = {
    "courier": 13,
    "disk of models": 61,
    "files of an earlier run": 90,
    "machine": 11,
    "none": 1,
    "tracking server": 17,
    "training process": 20,
    "user code": 11,
    "weights": 7,
    "worker": 44,
}
"""Each so-manieth kind of an area; co-prime to how the kinds were made, so that all are met."""


def chosen() -> list[Fault]:
    areas = defaultdict(list)
    for fault in registered():
        areas[fault.area].append(fault)
    return [fault for area, faults in areas.items() for fault in faults[:: EVERY[area]]]


def test_there_are_many_kinds_and_each_has_a_name_of_its_own() -> None:
    names = [f"{fault.area}: {fault.name}" for fault in registered()]
    assert len(set(names)) == len(names) > 200
    assert sum(fault.times for fault in registered()) > 1500


@pytest.mark.parametrize("fault", chosen(), ids=lambda fault: f"{fault.area}-{fault.name}")
def test_a_fault_breaks_no_promise(fault: Fault, tmp_path: Path) -> None:
    if fault.area == "disk of models" and why_not():
        pytest.skip(why_not())
    outcome = fault.inject(Site(tmp_path, random.Random(1)))  # noqa: S311
    assert outcome.fired
    assert outcome.problems == []
    if not fault.lost:
        assert outcome.failed == 0
