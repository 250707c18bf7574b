"""What a proof compares with, and what it costs of a dear module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onnxport
from onnxport.pipeline import proof
from onnxport.report import Check
from onnxport.signature import ModelSignature, TensorSpec
from onnxport.validation.budget import Reference

ROWS = torch.linspace(-1, 1, 12).reshape(6, 2)


class Counting(nn.Module):
    """Counts its runs in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, 3) for (N, 2)."""
        if x.dtype is torch.float64:
            DOUBLES.append(tuple(x.shape))
        return torch.sin(self.linear(x))


class Steep(nn.Module):
    """Amplifies rounding where its input is large, which only changed rows are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, 2) for (N, 2)."""
        return torch.sin(torch.exp(x * 3).cumsum(1) * x)


DOUBLES: list[tuple[int, ...]] = []


def _checks(module: nn.Module, folder: Path) -> tuple[Check, ...]:
    report = onnxport.export(module, ROWS, folder / "m.onnx")
    assert report.ok, report.error
    return report.checks


def test_all_rows_are_compared_with_float64_where_that_is_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "FLOAT64_S", 600.0)
    DOUBLES.clear()
    checks = _checks(Counting(), tmp_path)
    assert {check.reference for check in checks} == {"float64"}
    assert len(DOUBLES) == len(checks)


def test_of_a_dear_module_one_run_is_made_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "FLOAT64_S", -1.0)
    DOUBLES.clear()
    checks = _checks(Counting(), tmp_path)
    assert len(DOUBLES) == 1
    assert [check.reference for check in checks].count("float64") == 1
    real = [check for check in checks if check.reference == "float64"]
    assert [check.rows for check in real] == ["real"]


def test_rows_that_the_budget_of_others_refuses_are_run_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own rounding may be larger than that of the rows that were measured."""
    monkeypatch.setattr(proof, "FLOAT64_S", -1.0)
    narrow = []

    def none_at_all(outputs: torch.Tensor, noise: float, *_: object, source: str) -> object:
        narrow.append(noise)
        return Reference(expected=outputs + 1, exact=outputs + 1, budget=0.0, source=source)

    monkeypatch.setattr(proof, "pinned_reference", none_at_all)
    checks = _checks(Steep(), tmp_path)
    assert narrow
    assert {check.reference for check in checks} == {"float64"}


class Gives:
    """Stands for a session that gives one result."""

    provider = "CPUExecutionProvider"

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result

    def run(self, *_: object) -> list[torch.Tensor]:
        """Return it."""
        return [self.result]


def _reference(budget: float, source: str) -> Reference:
    zero = torch.zeros(3)
    return Reference(expected=zero, exact=zero, budget=budget, source=source)


def test_refined_references_are_asked_only_if_the_others_refuse_and_may_refuse_too() -> None:
    asked = []

    def refine() -> tuple[Reference, ...]:
        asked.append(1)
        return (_reference(0.1, "float64"),)

    spec = TensorSpec(name="y", dtype="float32", shape=(3,))
    signature = ModelSignature(inputs=(), outputs=(spec,))
    references = (_reference(0.01, "float32"),)
    case = proof.Case(sizes={}, rows="real", inputs=(), references=references, refine=refine)
    for distance, source, count in ((0.005, "float32", 0), (0.05, "float64", 1)):
        session: Any = Gives(torch.full((3,), distance))
        check = proof.check_case(signature, session, case, ())
        assert (check.ok, check.reference, len(asked)) == (True, source, count)
    session = Gives(torch.full((3,), 0.5))
    with pytest.raises(onnxport.VerificationError):
        proof.check_case(signature, session, case, ())
