"""Errors travel between processes with their text and their data."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING

import pytest

from onnxport import errors
from onnxport.report import Attempt, Check, ExportReport, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTPUT = OutputError(name="y", max_abs_error=math.inf, budget=0.5, ok=False, reason="differs")
CHECK = Check(
    provider="CPUExecutionProvider",
    sizes={"batch": 2},
    rows="real",
    reference="float64",
    outputs=(OUTPUT,),
    ok=False,
)
ATTEMPT = Attempt(core="trace", ok=False, reason="no", seconds=0.5)
REPORT = ExportReport(ok=False, error="no", checks=(CHECK,), attempts=(ATTEMPT,))


def subclasses(kind: type) -> Iterator[type]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def there_and_back(error: Exception) -> Exception:
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes


def test_every_error_of_the_package_is_tried_here() -> None:
    ours = {
        kind.__name__
        for kind in subclasses(errors.OnnxportError)
        if kind.__module__.startswith("onnxport.")
    }
    assert ours == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_keeps_its_type_and_its_text(name: str) -> None:
    error = getattr(errors, name)("What failed, and what to do next.")
    for again in (there_and_back(error), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == "What failed, and what to do next."
        assert again.args == error.args


def test_an_export_error_keeps_its_report() -> None:
    again = there_and_back(errors.ExportError("No model.", REPORT))
    assert str(again) == "No model."
    assert again.report == REPORT  # type: ignore[attr-defined]


def test_a_verification_error_keeps_its_checks() -> None:
    again = there_and_back(errors.VerificationError("They differ.", (CHECK,)))
    assert str(again) == "They differ."
    assert again.checks == (CHECK,)  # type: ignore[attr-defined]


def test_an_error_with_data_outside_of_its_arguments_would_be_noticed() -> None:
    with pytest.raises(TypeError, match="required keyword-only argument"):
        there_and_back(ForgetfulError("text", report=REPORT))


class ForgetfulError(Exception):
    """What no error of ours may look like."""

    def __init__(self, message: str, *, report: ExportReport) -> None:
        super().__init__(message)
        self.report = report
