"""Which version deserves the alias."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxport.report import Provenance
from onnxport.tracking.promotion import (
    Score,
    Standing,
    best_of,
    challenger_of,
    is_better,
    outranks,
    predecessor_of,
    read_score,
    score_of,
    score_tags,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
MODES = st.sampled_from(["min", "max"])
SCORES = st.builds(
    Score, metric=st.sampled_from(["", "loss", "acc"]), mode=MODES, value=st.floats()
)
UNKNOWN = (math.nan, math.inf, -math.inf)


def score(value: float, mode: str = "min", metric: str = "loss") -> Score:
    return Score(metric=metric, mode=mode, value=value)


@given(SCORES)
def test_a_score_survives_its_tags(one: Score) -> None:
    assert repr(read_score(score_tags(one))) == repr(one)


def test_tags_are_text_with_our_prefix() -> None:
    assert score_tags(score(0.25, "max", "acc")) == {
        "onnxport.metric.name": "acc",
        "onnxport.metric.mode": "max",
        "onnxport.metric.value": "0.25",
    }


@pytest.mark.parametrize("tags", [{}, {"onnxport.metric.value": "a person wrote this"}])
def test_without_readable_tags_nothing_is_known(tags: dict[str, str]) -> None:
    read = read_score(tags)
    assert (read.metric, read.mode) == ("", "min")
    assert math.isnan(read.value)


def test_the_score_of_a_checkpoint_is_its_monitored_metric() -> None:
    origin = Provenance(metrics={"acc": 0.9, "loss": 2.0}, monitor="acc", mode="max")
    assert score_of(origin) == score(0.9, "max", "acc")


def test_without_a_monitor_there_is_no_metric_and_without_the_metric_no_value() -> None:
    assert score_of(Provenance(metrics={"acc": 0.9})).metric == ""
    missing = score_of(Provenance(monitor="acc", mode="max"))
    assert (missing.metric, missing.mode) == ("acc", "max")
    assert math.isnan(missing.value)


@given(FINITE, FINITE, MODES)
def test_of_two_models_at_most_one_is_better_and_it_is_the_right_one(
    a: float, b: float, mode: str
) -> None:
    first, second = score(a, mode), score(b, mode)
    assert not (is_better(first, second) and is_better(second, first))
    assert is_better(first, second) == (a > b if mode == "max" else a < b)


@given(SCORES, st.floats(0, 1e9))
def test_no_model_with_a_metric_is_better_than_itself(one: Score, min_delta: float) -> None:
    assert not is_better(one, one, min_delta) or not one.metric


@given(st.integers(-100, 100), st.integers(-100, 100), st.integers(0, 50), MODES)
def test_the_gain_must_be_more_than_min_delta(a: int, b: int, delta: int, mode: str) -> None:
    gain = a - b if mode == "max" else b - a
    assert is_better(score(a, mode), score(b, mode), delta) == (gain > delta)


@pytest.mark.parametrize("value", UNKNOWN)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_an_unknown_value_never_takes_the_alias_and_never_defends_it(
    value: float, mode: str
) -> None:
    assert not is_better(score(value, mode), None)
    assert not is_better(score(value, mode), score(1.0, mode))
    assert is_better(score(1.0, mode), score(value, mode))


def test_the_first_model_takes_the_alias() -> None:
    assert is_better(score(1.0), None)
    assert is_better(Score(), None)


def test_without_metrics_the_newer_model_wins_but_never_over_a_measured_one() -> None:
    assert is_better(Score(), Score())
    assert not is_better(Score(), score(1.0))
    assert not is_better(Score(), score(math.nan))


@pytest.mark.parametrize(
    "champion", [score(9.0, metric="other"), score(9.0, mode="max"), Score(value=9.0)]
)
def test_scores_of_other_metrics_or_modes_are_left_to_a_person(champion: Score) -> None:
    assert not is_better(score(1.0), champion)


# --- several versions -------------------------------------------------------------------------


def standing(version: int, value: float = math.nan, **options: Any) -> Standing:
    metric = options.pop("metric", "loss")
    return Standing(version=version, score=score(value, metric=metric), **options)


STANDINGS = st.lists(
    st.builds(
        Standing,
        version=st.integers(1, 50),
        score=st.builds(Score, metric=st.just("loss"), mode=st.just("min"), value=FINITE),
        rejected=st.booleans(),
    ),
    unique_by=lambda each: each.version,
)


@given(STANDINGS, st.randoms())
def test_no_other_version_outranks_the_best_in_whatever_order_they_come(
    standings: list[Standing], order: Any
) -> None:
    best = best_of(standings)
    order.shuffle(standings)
    assert best_of(standings) == best
    fit = [each for each in standings if not each.rejected]
    assert (best is None) == (not fit)
    assert best is None or not any(outranks(each, best) for each in fit)


def test_without_metrics_the_newer_version_is_better() -> None:
    one, two = standing(1, metric=""), standing(2, metric="")
    assert outranks(two, one)
    assert not outranks(one, two)
    assert not outranks(standing(3, metric=""), standing(1, 0.5))
    assert best_of([two, one]) == two


def test_the_challenger_is_the_best_that_never_was_champion() -> None:
    champion = standing(4, 0.1, promoted=9)
    others = [
        standing(1, 0.2, promoted=3),
        standing(2, 0.5),
        standing(3, 0.4),
        standing(5, 0.3, rejected=True),
        standing(6, 0.01, metric="acc"),
        standing(7),
    ]
    assert challenger_of(champion, [champion, *others]) == others[2]
    assert challenger_of(champion, [champion, others[-1]]) is None
    assert challenger_of(None, others) is None


def test_the_predecessor_is_who_had_the_alias_last() -> None:
    standings = [
        standing(1, promoted=5),
        standing(2, promoted=9, rejected=True),
        standing(3, promoted=7),
        standing(4),
    ]
    assert predecessor_of(3, standings) == standings[0]
    assert predecessor_of(1, standings) == standings[2]
    assert predecessor_of(1, standings[:2]) is None
