"""Which version deserves the alias."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxport.report import Provenance
from onnxport.tracking.promotion import Score, is_better, read_score, score_of, score_tags

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
