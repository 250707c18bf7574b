"""The power fails, or everything is killed, between any two operations of the disk."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

import pytest

from faults.crash import all_states
from faults.disk import mounted, why_not
from faults.ground import (
    false_reports,
    left_behind,
    missing,
    train,
    undisturbed,
    wrong_models,
)
from onnxport import OnnxExport, resume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from faults.crash import State

pytestmark = [
    pytest.mark.integration,
    pytest.mark.worker,
    pytest.mark.skipif(why_not() != "", reason=why_not()),
]

STEPS = 8
RESUMED, WITH_TEMPLATE, CONTINUED = 29, 13, 401
"""Each so-manieth state is resumed, or trained on from: primes, so that all stages are met."""


class Recorded(NamedTuple):
    """A training, and all that its disk may be found with.

    Args:
        folder: Where it was.
        states: After how many operations, by which rules, and what is found.
    """

    folder: Path
    states: list[tuple[int, str, State]]


@pytest.fixture(scope="module", params=[False, True], ids=["inline", "worker"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Train on a disk that writes down what it does."""
    root = tmp_path_factory.mktemp("recorded")
    with mounted(root) as disk:
        export = OnnxExport(mlflow=False, core="trace", background=request.param, page=True)
        run = train(disk.folder / "c", export, steps=STEPS)
        assert run.error is None
        assert tuple(run.losses) == undisturbed(STEPS)
        assert all(report.ok for report in run.reports)
        operations = disk.operations()
    seen, states = set(), []
    for after, model, state in all_states(operations):
        key = (state.folders, frozenset(state.files.items()))
        if key not in seen:
            seen.add(key)
            states.append((after, model, state))
    assert len(states) > len(operations)
    return Recorded(disk.folder, states)


def laid(recorded: Recorded, every: int, *, if_name: str = "") -> Iterator[tuple[str, Path]]:
    """Make the folders that may be found, one after the other, where training was.

    Args:
        recorded: All of them.
        every: Each so-manieth is made.
        if_name: Only those in which the processes alone were killed, and a file's name has this.
    """
    found = [
        (after, model, state)
        for after, model, state in recorded.states
        if not if_name or (model == "killed" and any(if_name in name for name in state.files))
    ]
    for after, model, state in found[::every]:
        shutil.rmtree(recorded.folder, ignore_errors=True)
        recorded.folder.mkdir()
        state.lay(recorded.folder)
        yield f"{model} after {after}", recorded.folder / "c"


def test_no_moment_leaves_a_wrong_model(recorded: Recorded) -> None:
    found = {
        name: problems
        for name, folder in laid(recorded, 1)
        if (problems := wrong_models(folder, folder) + false_reports(folder))
    }
    assert found == {}


def test_what_is_owed_can_be_made_without_the_module(recorded: Recorded) -> None:
    for name, folder in laid(recorded, RESUMED):
        if not folder.is_dir():
            continue
        resume(folder)
        assert wrong_models(folder, folder) + false_reports(folder) == [], name
        notes = {path for path in left_behind(folder) if "pending" in path or "template" in path}
        assert set(left_behind(folder)) == notes, name
        if not notes and name.startswith("killed"):
            assert missing(folder, folder) == [], name


def test_models_are_made_from_a_template_that_was_kept(recorded: Recorded) -> None:
    made = 0
    for name, folder in laid(recorded, WITH_TEMPLATE, if_name="onnxport-template"):
        made += sum(report.ok for report in resume(folder))
        assert wrong_models(folder, folder) + false_reports(folder) == [], name
    assert made > 0


def test_the_next_fit_leaves_everything_as_it_should_be(recorded: Recorded) -> None:
    for name, folder in laid(recorded, CONTINUED):
        run = train(folder, OnnxExport(mlflow=False, core="trace", background=False), steps=STEPS)
        assert run.error is None, name
        assert tuple(run.losses) == undisturbed(STEPS), name
        assert wrong_models(folder, folder) + false_reports(folder, run.reports) == [], name
        if name.startswith("killed"):
            assert missing(folder, folder) + left_behind(folder) == [], name
