"""Metrics that were computed twice, what is kept to compute them, and what they decide."""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnxport.callbacks.batches import KeptBatches, read_batches
from onnxport.config import ExportOptions, Metrics, Verify
from onnxport.errors import ConfigurationError
from onnxport.report import MetricParity, Provenance
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
from onnxport.validation.metrics import compare_metrics

ACCURACY = Provenance(monitor="acc", mode="max")


def only(name: str, one: float, other: float, origin: Provenance = ACCURACY, **options: Any) -> Any:
    [pair] = compare_metrics({name: one}, {name: other}, Metrics(**options), origin)
    return pair


@pytest.mark.parametrize(
    ("one", "other", "ok"),
    [
        (0.90, 0.90, True),
        (0.90, 0.895, True),
        (0.90, 0.88, False),
        (0.90, 0.99, True),  # better
        (-0.90, -0.92, False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (0.9, math.nan, False),
        (math.nan, 0.9, False),
        (1e-9, 5e-8, True),  # rounding
        (0.0, 0.0, True),
        (0.0, -0.1, False),
    ],
)
def test_the_monitored_metric_may_be_a_little_worse(one: float, other: float, ok: bool) -> None:
    assert only("acc", one, other).ok is ok
    assert bool(only("acc", one, other).reason) is not ok


def test_for_the_minimum_worse_is_more() -> None:
    loss = Provenance(monitor="loss", mode="min")
    assert not only("loss", 1.0, 1.02, loss).ok
    assert only("loss", 1.0, 0.5, loss).ok


def test_another_metric_may_not_differ_in_either_direction() -> None:
    assert [only("f1", 0.5, value).ok for value in (0.5, 0.504, 0.51, 0.49)] == [
        True,
        True,
        False,
        False,
    ]


def test_limits_by_name_leave_the_others_free() -> None:
    limits = {"acc": 0.1}
    assert only("acc", 0.9, 0.85, max_degradation=limits).ok
    assert not only("acc", 0.9, 0.8, max_degradation=limits).ok
    assert only("f1", 0.9, 0.1, max_degradation=limits).ok
    assert only("f1", 0.9, math.nan, max_degradation=limits).ok


def test_what_is_logged_with_one_of_them_alone_is_refused() -> None:
    pairs = compare_metrics({"acc": 1.0}, {"f1": 1.0}, Metrics(), ACCURACY)
    assert [(pair.name, pair.ok, pair.reason) for pair in pairs] == [
        ("acc", False, "was logged with PyTorch alone"),
        ("f1", False, "was logged with the model alone"),
    ]


@pytest.mark.parametrize(
    ("given", "batches"), [(True, None), (7, 7), (Metrics(batches=2), 2), (Metrics(), None)]
)
def test_the_short_forms_of_the_argument(given: Any, batches: int | None) -> None:
    found = Metrics.of(given)
    assert found is not None
    assert found.batches == batches


def test_it_is_off_by_default() -> None:
    options = ExportOptions.of(core="auto", inputs=None, opset=None, precision=None, verify=True)
    assert options.metrics is None
    assert Metrics.of(False) is None


@pytest.mark.parametrize("wrong", [0, -1, "all", 2.5, None, {"batches": 3}, Verify()])
def test_what_is_no_form_of_the_argument_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        Metrics.of(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": 0},
        {"batches": True},
        {"every_n_checkpoints": 0},
        {"max_degradation": -0.1},
        {"max_degradation": math.nan},
        {"max_degradation": {"acc": "a little"}},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Metrics(**wrong)


# --- what is kept -------------------------------------------------------------------------------


def kept(*batches: tuple[Any, int], **options: Any) -> KeptBatches:
    found = KeptBatches(**options)
    for batch, loader in batches:
        found.add(batch, loader)
    return found


def test_batches_come_back_by_loader_and_in_order() -> None:
    file = kept(({"x": torch.ones(2)}, 0), ((torch.zeros(1), "a"), 1), ({"x": torch.ones(3)}, 0))
    assert dict(file.counts) == {0: 2, 1: 1}
    assert [len(batch["x"]) for batch in read_batches(file.fileno(), 0)] == [2, 3]
    # Readers do not get in each other's way.
    one, other = read_batches(file.fileno(), 0), read_batches(file.fileno(), 0)
    assert torch.equal(next(one)["x"], next(other)["x"])
    assert [name for _, name in read_batches(file.fileno(), 1)] == ["a"]


def test_a_view_is_kept_without_what_it_is_a_view_of() -> None:
    file = kept((torch.zeros(1_000_000)[:3], 0))
    assert os.fstat(file.fileno()).st_size < 10_000


def test_a_batch_that_changes_later_was_copied() -> None:
    batch = torch.ones(2)
    file = kept((batch, 0))
    batch.zero_()
    assert next(read_batches(file.fileno(), 0)).tolist() == [1.0, 1.0]


def test_so_many_of_each_loader() -> None:
    file = kept(*[(torch.ones(1), place % 2) for place in range(9)], most=2)
    assert dict(file.counts) == {0: 2, 1: 2}


def test_there_is_a_limit_and_the_first_is_always_kept() -> None:
    file = kept(*[(torch.ones(1000), 0) for _ in range(5)], most_bytes=6000)
    assert dict(file.counts) == {0: 1}
    assert file.full
    assert not file.problem


def test_what_cannot_be_kept_says_so() -> None:
    file = kept(({"x": torch.ones(1), "lock": threading.Lock()}, 0))
    assert "cannot be kept" in file.problem
    assert "lock" in file.problem


def test_the_file_has_no_name() -> None:
    file = kept((torch.ones(1), 0))
    assert os.fstat(file.fileno()).st_nlink == 0


# --- what they decide ---------------------------------------------------------------------------


def parity(*, ok: bool) -> MetricParity:
    reason = "" if ok else "acc is worse"
    return MetricParity(provider="CPU", batches=1, calls=1, metrics=(), ok=ok, reason=reason)


def standing(version: int, value: float, **more: Any) -> Standing:
    barred = more.pop("barred", "")
    score = Score(metric="acc", mode="max", value=value, barred=barred)
    return Standing(version=version, score=score, **more)


@given(st.text(max_size=20), st.floats())
def test_a_bar_survives_its_tags(barred: str, value: float) -> None:
    one = Score(metric="acc", mode="max", value=value, barred=barred)
    assert repr(read_score(score_tags(one))) == repr(one)


def test_a_model_whose_metrics_are_worse_is_barred() -> None:
    origin = Provenance(metrics={"acc": 0.9}, monitor="acc", mode="max")
    assert score_of(origin, parity(ok=False)).barred == "acc is worse"
    assert score_of(origin, parity(ok=True)).barred == ""
    assert score_of(origin).barred == ""
    assert score_of(Provenance(), parity(ok=False)).barred == "acc is worse"


def test_what_is_barred_is_never_the_best() -> None:
    good, barred = standing(1, 0.5), standing(2, 0.9, barred="worse")
    assert best_of([good, barred]) is good
    assert best_of([barred]) is None
    assert not is_better(barred.score, None)
    assert not outranks(barred, good)
    assert challenger_of(good, [good, barred]) is None


def test_without_a_metric_the_newer_one_is_the_best_unless_it_is_barred() -> None:
    old, new = Standing(version=1, score=Score()), Standing(version=2, score=Score(barred="worse"))
    assert best_of([old, new]) is old
    assert not outranks(new, old)


def test_a_person_may_give_it_the_alias_and_another_may_take_it_away() -> None:
    barred = standing(2, 0.9, barred="worse", promoted=5)
    assert outranks(standing(3, 0.95), barred)
    assert not outranks(standing(3, 0.8), barred)
    assert predecessor_of(3, [barred]) is barred
