"""Metrics belong to the weights that they were measured with."""

from __future__ import annotations

import math

from onnxport.callbacks.measured import Measured


def test_equal_values_in_two_validations_are_both_measured() -> None:
    measured = Measured()
    for step in (3, 6):
        measured.begin({"acc": 0.5} if step > 3 else {})
        measured.end({"acc": 0.5}, step)
    assert measured.fresh({"acc": 0.5}, 6) == {"acc": 0.5}
    assert measured.fresh({"acc": 0.5}, 7) == {}


def test_a_training_metric_that_is_nan_is_no_validation_metric() -> None:
    measured = Measured()
    measured.begin({"train_loss": math.nan})
    measured.end({"train_loss": math.nan, "acc": 0.5}, 3)
    assert measured.fresh({"train_loss": 1.0, "acc": 0.5}, 4) == {"train_loss": 1.0}


def test_without_a_validation_everything_is_taken_as_it_is() -> None:
    assert Measured().fresh({"loss": 1.0}, 5) == {"loss": 1.0}
    assert Measured().at("loss", 5, otherwise=1.0) == 1.0


def test_a_value_is_looked_up_by_step_and_steps_of_an_earlier_fit_are_unknown() -> None:
    measured = Measured()
    measured.begin({})
    measured.end({"acc": 0.5}, 10)
    assert measured.at("acc", 10, otherwise=0.9) == 0.5
    assert measured.at("acc", 7, otherwise=0.9) == 0.9
    assert math.isnan(measured.at("acc", 12, otherwise=0.9))
