"""When to export."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxport.callbacks.cadence import Cadence, read_when
from onnxport.errors import ConfigurationError


@given(st.integers(1, 50), st.integers(0, 300))
def test_the_first_and_then_each_nth_checkpoint_is_exported(n: int, total: int) -> None:
    cadence = Cadence(every_n_checkpoints=n)
    exported = [count for count in range(total) if cadence.should_export(count)]
    assert exported == list(range(0, total, n))


@given(st.integers(1, 50), st.integers(0, 10_000))
def test_in_any_n_checkpoints_in_a_row_exactly_one_is_exported(n: int, start: int) -> None:
    cadence = Cadence(every_n_checkpoints=n)
    assert sum(cadence.should_export(count) for count in range(start, start + n)) == 1


@given(st.integers(0, 10_000))
def test_with_zero_no_checkpoint_is_exported_before_the_end(count: int) -> None:
    assert not Cadence(every_n_checkpoints=0).should_export(count)


@pytest.mark.parametrize(("n", "at_end"), [(-1, True), (-1, False), (0, False)])
def test_a_cadence_that_exports_nothing_is_refused(n: int, at_end: bool) -> None:
    with pytest.raises(ConfigurationError, match=rf"every_n_checkpoints=.*got {n}\."):
        Cadence(every_n_checkpoints=n, at_end=at_end)


def test_the_words_of_when_are_read() -> None:
    assert read_when("checkpoint") == Cadence(every_n_checkpoints=1, at_end=True)
    assert read_when("end") == Cadence(every_n_checkpoints=0, at_end=True)
    cadence = Cadence(every_n_checkpoints=3, at_end=False)
    assert read_when(cadence) is cadence


@pytest.mark.parametrize("when", ["epoch", "", None, 3])
def test_another_word_is_refused_with_the_choices(when: object) -> None:
    with pytest.raises(ConfigurationError, match=r"'checkpoint', 'end' or Cadence\(\.\.\.\); got"):
        read_when(when)  # type: ignore[arg-type]
