"""Versions and aliases, on a real store: who is champion, and what people may do about it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from servers import free_port

from onnxport.config import MLflow
from onnxport.errors import TrackingError
from onnxport.report import TrackingRecord
from onnxport.tracking import promote, registry, rollback
from onnxport.tracking.base import RunAddress
from onnxport.tracking.mlflow import MlflowTracker
from onnxport.tracking.promotion import Score, score_tags
from onnxport.tracking.registry import Registry, register

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Runs:
    """Registers models of made-up scores, each run with its own MLflow run."""

    def __init__(self, uri: str, **options: Any) -> None:
        self.client = MlflowClient(uri)
        self.options = MLflow(**{"register": "n"} | options)
        self.registry = Registry(self.client, "n", self.options.alias)
        self.made = 0

    def run(self, *scores: float, metric: str = "acc") -> list[int | None]:
        run_id = self.client.create_run("0").info.run_id
        return [self.add(run_id, value, metric) for value in scores]

    def add(
        self, run_id: str, value: float, metric: str = "acc", key: str | None = None
    ) -> int | None:
        self.made += 1
        logged = self.client.create_logged_model("0", name="m", source_run_id=run_id)
        score = Score(metric=metric, mode="max", value=value)
        key = key or f"{run_id}:{self.made}"
        tags = score_tags(score) | {"onnxport.key": key, "onnxport.validated": "true"}
        made = register(self.client, self.options, TrackingRecord(uri=""), logged, tags, last=False)
        return made.version

    @property
    def aliases(self) -> dict[str, int]:
        found = self.client.get_registered_model("n").aliases
        return {alias: int(version) for alias, version in found.items()}


def test_the_best_is_champion_the_best_loser_challenger(store: str) -> None:
    runs = Runs(store)
    assert runs.run(0.5, 0.4, 0.7, 0.6) == [1, None, 2, None]
    assert runs.aliases == {"champion": 2, "previous": 1}
    assert runs.run(0.3, 0.6) == [3, 4]  # each the best of its own run
    assert runs.aliases == {"champion": 2, "previous": 1, "challenger": 4}
    assert runs.run(0.8) == [5]
    assert runs.aliases == {"champion": 5, "previous": 2, "challenger": 4}
    assert runs.run(float("nan")) == [None]
    assert runs.aliases == {"champion": 5, "previous": 2, "challenger": 4}


def test_another_metric_never_takes_the_alias(store: str) -> None:
    runs = Runs(store)
    runs.run(0.5)
    assert runs.run(0.9, metric="f1") == [2]
    assert runs.aliases == {"champion": 1}


def test_min_delta_keeps_the_champion(store: str) -> None:
    runs = Runs(store, min_delta=0.1)
    runs.run(0.5)
    runs.run(0.55)
    assert runs.aliases == {"champion": 1, "challenger": 2}
    runs.run(0.65)
    assert runs.aliases == {"champion": 3, "previous": 1, "challenger": 2}


def test_aliases_of_another_name_are_kept_apart(store: str) -> None:
    runs, others = Runs(store), Runs(store, alias="prod")
    runs.run(0.5, 0.6)
    others.run(0.55)
    assert runs.aliases == {
        "champion": 2,
        "previous": 1,
        "prod": 2,  # the best of all that are there
        "prod-challenger": 3,
    }


def test_a_rollback_goes_back_and_the_rejected_never_returns(store: str) -> None:
    runs = Runs(store)
    runs.run(0.5, 0.6, 0.7)
    assert runs.aliases == {"champion": 3, "previous": 2}
    assert runs.registry.rollback() == (3, 2)
    assert runs.aliases == {"champion": 2, "previous": 1}
    assert runs.registry.rollback() == (2, 1)
    assert runs.aliases == {"champion": 1}
    with pytest.raises(TrackingError, match="No other version of 'n' was 'champion'"):
        runs.registry.rollback()
    runs.run(0.55)
    assert runs.aliases == {"champion": 4, "previous": 1}


def test_what_a_person_promotes_is_pinned_until_a_person_says_otherwise(store: str) -> None:
    runs = Runs(store)
    runs.run(0.5, 0.6)
    assert runs.registry.promote(1, pin=True) == 2
    assert runs.aliases == {"champion": 1, "previous": 2}
    runs.run(0.9)
    assert runs.aliases == {"champion": 1, "previous": 2, "challenger": 3}
    assert runs.registry.promote(1, pin=False) == 1
    runs.run(0.7)
    assert runs.aliases == {"champion": 3, "previous": 1, "challenger": 4}
    with pytest.raises(TrackingError, match="There is no version 99 of a model 'n'"):
        runs.registry.promote(99, pin=True)


def test_a_pin_ends_with_what_was_pinned(store: str) -> None:
    runs = Runs(store)
    runs.run(0.5, 0.6)
    runs.registry.promote(1, pin=True)
    assert runs.registry.rollback() == (1, 2)
    runs.run(0.9)
    assert runs.aliases == {"champion": 3, "previous": 2}


def test_the_same_weights_in_two_files_are_one_version(store: str) -> None:
    runs = Runs(store, policy="all")
    run_id = runs.client.create_run("0").info.run_id
    keys = [f"{run_id}:{what}" for what in ("8:abc:one", "8:abc:last", "9:abd:two", "9:abd:last")]
    made = [runs.add(run_id, 0.5, key=key) for key in keys]
    assert made == [1, 1, 2, 2]
    assert len(runs.client.search_model_versions("name = 'n'")) == 2


def test_a_rejected_version_may_be_promoted_by_hand(store: str) -> None:
    runs = Runs(store)
    runs.run(0.5, 0.6)
    runs.registry.rollback()
    runs.registry.promote(2, pin=False)
    assert runs.aliases == {"champion": 2, "previous": 1}


def test_nobody_is_champion_of_a_name_that_is_not_there(store: str) -> None:
    with pytest.raises(TrackingError, match="No version of 'n' is 'champion'"):
        Runs(store).registry.rollback()
    with pytest.raises(TrackingError, match="There is no version 1 of a model 'n'"):
        Runs(store).registry.promote(1, pin=True)


def scores_of(seed: int) -> list[float]:
    generator = random.Random(seed)  # noqa: S311 - made-up scores
    return [generator.random() for _ in range(8)]


PROCESS = """
    import sys, time, warnings
    warnings.simplefilter("ignore")
    from test_registry import Runs, scores_of
    runs, start = Runs(sys.argv[1]), float(sys.argv[3])
    run_id = runs.client.create_run("0").info.run_id
    time.sleep(max(0, start - time.time()))
    for score in scores_of(int(sys.argv[2])):
        runs.add(run_id, score)
"""


def test_four_trainings_converge_on_the_best(store: str, tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(textwrap.dedent(PROCESS))
    here = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    start = str(time.time() + 8)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), store, str(seed), start],
            env=os.environ | {"PYTHONPATH": here},
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    best = max(max(scores_of(seed)) for seed in range(4))
    champion = MlflowClient(store).get_model_version_by_alias("n", "champion")
    assert float(champion.tags["onnxport.metric.value"]) == best


def test_a_version_that_was_not_proven_never_gets_the_alias_by_itself(store: str) -> None:
    runs = Runs(store)
    runs.client.create_registered_model("n")
    runs.client.create_model_version("n", "file:///somewhere", await_creation_for=0)
    runs.run(0.5)
    assert runs.aliases == {"champion": 2}


def test_what_a_person_gave_the_alias_to_stays_if_it_is_none_of_ours(store: str) -> None:
    runs = Runs(store)
    runs.client.create_registered_model("n")
    runs.client.create_model_version("n", "file:///somewhere", await_creation_for=0)
    runs.client.set_registered_model_alias("n", "champion", "1")
    runs.run(0.5)
    runs.run(float("nan"), metric="")
    assert runs.aliases == {"champion": 1}


def test_one_that_was_overtaken_corrects_it_and_leaves_no_trace(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, rival = Runs(store), Runs(store)
    runs.run(0.5)
    move = Registry._move
    overtaken = []

    def late(self: Registry, version: int, champion: Any, **tagged: bool) -> None:
        if self is not rival.registry and not overtaken:
            overtaken.append(version)
            rival.run(0.9)  # between our look and our move
        move(self, version, champion, **tagged)

    monkeypatch.setattr(Registry, "_move", late)
    runs.run(0.6)
    assert overtaken == [2]
    assert runs.aliases == {"champion": 3, "previous": 1, "challenger": 2}


def test_a_champion_that_is_older_than_all_that_are_looked_at(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "NEWEST", 3)
    runs = Runs(store, policy="all")
    runs.run(0.8, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert runs.aliases == {"champion": 1, "challenger": 6}
    runs.run(0.9)
    assert runs.aliases == {"champion": 7, "previous": 1, "challenger": 6}


def test_a_rollback_without_the_alias_of_the_one_before(store: str) -> None:
    runs = Runs(store)
    runs.run(0.5, 0.6)
    runs.client.delete_registered_model_alias("n", "previous")
    assert runs.registry.rollback() == (2, 1)
    assert runs.aliases == {"champion": 1}


def test_removing_what_was_never_told_starts_no_run(store: str) -> None:
    address = RunAddress(uri=store, fit="none", options=MLflow())
    MlflowTracker(address).remove("a place")
    assert MlflowClient(store).get_experiment_by_name("onnxport") is None


@pytest.mark.parametrize("decide", [partial(promote, version=1), rollback])
def test_people_are_told_at_once_that_a_server_is_down(
    decide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    asked = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.setattr(asked, "get_registered_model", lambda *_: pytest.fail("it was called"))
    with pytest.raises(TrackingError, match=rf"{uri} is not used: .*refused"):
        decide("n", tracking_uri=uri)


def test_no_password_is_shown_when_a_server_is_down() -> None:
    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as caught:
        rollback("n", tracking_uri=uri)
    assert "secret" not in str(caught.value)


def test_a_registry_may_be_elsewhere(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(store)
    runs.run(0.5)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", store)
    assert promote("n", 1, tracking_uri=f"http://127.0.0.1:{free_port()}") == 1
