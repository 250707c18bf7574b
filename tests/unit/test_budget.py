"""How far ONNX Runtime may be from PyTorch, measured on small networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from typing_extensions import override

from onnxport.config import Tolerance
from onnxport.validation.budget import Reference, make_references
from onnxport.validation.parity import compare

ROWS = (1, 2, 9)
EPS = torch.finfo(torch.float32).eps


class Cancelling(nn.Module):
    """Adds a large number and takes it away again: most digits are lost."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 4096.0) - 4096.0


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


class Thresholded(nn.Module):
    """One element of each row is 0 or 1, by the last digits of a sum."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = x.clone()
        rest[:, 0] = ((x[:, 0] + 4096.0) - 4096.0 - x[:, 0] > 0).to(x.dtype)
        return rest * 1.1


def references(
    module: nn.Module, tolerance: Tolerance | None = None, seed: int = 0
) -> list[Reference]:
    """The reference of each of several batches, all with float64."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(rows, 16, generator=generator) for rows in ROWS]
    double = copy.deepcopy(module).double()
    with torch.no_grad():
        made = make_references(
            [(module(batch),) for batch in batches],
            [(double(batch.double()),) for batch in batches],
            tolerance or Tolerance(),
        )
    return [reference for (reference,) in made]


def scale(reference: Reference) -> float:
    return float(reference.exact.abs().max())


def widest(reference: Reference) -> float:
    """The widest budget of any element."""
    budget = torch.as_tensor(reference.budget)
    return float(budget.max()) if budget.numel() else 0.0


def reference(
    out: torch.Tensor, exact: torch.Tensor | None = None, tolerance: Tolerance | None = None
) -> Reference:
    """The reference of one output of one run."""
    doubles = [None if exact is None else (exact,)]
    return make_references([(out,)], doubles, tolerance or Tolerance())[0][0]


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_perturbation_of_a_thousandth_fits_in_no_budget_of_a_small_network(seed: int) -> None:
    for one in references(mlp(seed), seed=seed):
        perturbed = one.expected.clone()
        perturbed.view(-1)[0] += 1e-3 * scale(one)
        assert compare("y", one.expected, one).ok
        assert not compare("y", perturbed, one).ok


@pytest.mark.parametrize("seed", range(10))
def test_the_same_network_in_another_order_of_sums_fits(seed: int) -> None:
    module = mlp(seed)
    reordered = copy.deepcopy(module)
    with torch.no_grad():
        order = torch.randperm(32)
        reordered[0].weight.copy_(module[0].weight[order])
        reordered[0].bias.copy_(module[0].bias[order])
        reordered[2].weight.copy_(module[2].weight[:, order])
        generator = torch.Generator().manual_seed(seed)
        for one in references(module, seed=seed):
            batch = torch.randn(len(one.expected), 16, generator=generator)
            other = reordered(batch)
            assert compare("y", other, one).ok


@pytest.mark.parametrize("seed", range(3))
def test_a_nudged_weight_does_not_fit(seed: int) -> None:
    module = mlp(seed)
    one = references(module, seed=seed)[0]
    with torch.no_grad():
        module[4].weight[0].mul_(1.01)
        generator = torch.Generator().manual_seed(seed)
        wrong = module(torch.randn(ROWS[0], 16, generator=generator))
    assert not compare("y", wrong, one).ok


def test_a_network_that_amplifies_rounding_gets_a_wide_budget() -> None:
    wide = references(Cancelling())
    narrow = references(mlp(0))
    assert min(widest(one) / scale(one) for one in wide) > 5e-4
    assert max(widest(one) / scale(one) for one in narrow) < 1e-4
    perturbed = wide[0].exact.float() + 3e-4 * scale(wide[0])
    assert compare("y", perturbed, wide[0]).ok


def test_even_a_wide_budget_does_not_take_another_result() -> None:
    one = references(Cancelling())[0]
    assert not compare("y", one.expected * 1.1, one).ok


def test_the_budget_grows_with_the_factor() -> None:
    module = mlp(0)
    narrow = references(module, Tolerance(factor=1))
    wide = references(module, Tolerance(factor=100))
    assert all(widest(a) < widest(b) for a, b in zip(narrow, wide, strict=True))


def test_the_error_of_the_worst_run_counts_for_all_runs() -> None:
    lucky, unlucky = torch.tensor([2.0]), torch.tensor([3.0])
    made = make_references(
        [(lucky,), (unlucky,)],
        [(lucky.double(),), (unlucky.double() * (1 + 1e-4),)],
        Tolerance(factor=2),
    )
    budgets = [widest(one) / scale(one) for (one,) in made]
    assert budgets[0] == pytest.approx(2e-4, rel=0.05)
    assert budgets[0] == pytest.approx(budgets[1])


def test_each_output_has_a_budget_of_its_own() -> None:
    clean, noisy = torch.tensor([1.0]), torch.tensor([1.0])
    ((first, second),) = make_references(
        [(clean, noisy)], [(clean.double() * (1 + 1e-7), noisy.double() * 1.01)], Tolerance()
    )
    assert widest(first) < 1e-5
    assert widest(second) > 1e-2


# --- where the budget comes from --------------------------------------------------------------


def test_the_least_budget_is_a_few_units_of_the_last_place() -> None:
    out = torch.tensor([1.0, -8.0])
    one = reference(out, out.double() * (1 + EPS / 32), Tolerance(factor=1))
    assert 32 * EPS * 8 <= widest(one) <= 34 * EPS * 8


@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float32, 2e-4), (torch.float64, 1e-9), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)],
)
def test_without_float64_the_budget_comes_from_a_table(dtype: torch.dtype, relative: float) -> None:
    one = reference(torch.tensor([0.5, -4.0], dtype=dtype))
    assert one.source == "table"
    assert widest(one) == pytest.approx(4 * relative)
    assert torch.equal(one.exact, one.expected)


def test_a_float64_result_of_another_shape_is_not_used() -> None:
    one = reference(torch.ones(2), torch.ones(3, dtype=torch.float64))
    assert one.source == "table"
    assert widest(one) == pytest.approx(2e-4)


def test_a_run_in_float64_is_the_reference_where_there_is_one() -> None:
    exact = torch.tensor([1.0 + 1e-7], dtype=torch.float64)
    one = reference(torch.ones(1), exact)
    assert one.source == "float64"
    assert torch.equal(one.exact, exact)


def test_a_given_tolerance_replaces_the_measured_one() -> None:
    out, exact = torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0], dtype=torch.float64)
    assert widest(reference(out, exact, Tolerance(atol=0.5))) == 0.5
    assert widest(reference(out, exact, Tolerance(rtol=0.1))) == pytest.approx(0.4)
    assert widest(reference(out, exact, Tolerance(atol=0.5, rtol=0.1))) == pytest.approx(0.9)
    assert widest(reference(out, exact, Tolerance(atol=0.0))) == 0.0
    assert widest(reference(out, None, Tolerance(atol=0.5))) == 0.5


def test_values_that_are_not_finite_do_not_widen_the_budget() -> None:
    out = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert widest(reference(out)) == pytest.approx(2e-4)
    assert math.isfinite(widest(reference(out, out.double())))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_output_has_no_budget(shape: tuple[int, ...]) -> None:
    out = torch.zeros(shape)
    assert widest(reference(out, out.double())) == 0.0


def test_zeros_have_no_budget() -> None:
    out = torch.zeros(3)
    assert widest(reference(out, out.double())) == 0.0


def test_small_values_are_measured_by_the_typical_size_not_by_their_own() -> None:
    out = torch.tensor([1e-9, 1.0, 2.0, 3.0])
    one = reference(out, out.double() + 1e-7)
    assert compare("y", torch.tensor([2e-7, 1.0, 2.0, 3.0]), one).ok


def test_large_and_small_columns_have_budgets_of_their_own() -> None:
    out = torch.tensor([[1e-3, 1e6], [2e-3, 2e6], [3e-3, 3e6], [4e-3, 4e-3]])
    one = reference(out, out.double() * (1 + 1e-7))
    wrong = out.clone()
    wrong[0, 0] *= 1.01
    assert compare("y", out, one).ok
    assert not compare("y", wrong, one).ok


def test_a_huge_masked_value_does_not_excuse_the_other_values() -> None:
    out = torch.tensor([1.0, 2.0, -1e9])
    exact = torch.tensor([1.0 + 1e-7, 2.0 + 1e-7, -1e9], dtype=torch.float64)
    one = reference(out, exact)
    assert not compare("y", torch.tensor([2.0, 1.0, -1e9]), one).ok


# --- integers ---------------------------------------------------------------------------------


def test_integers_that_float64_decides_alike_have_no_budget() -> None:
    labels = torch.tensor([3, 0, 7])
    one = reference(labels, labels.clone())
    assert widest(one) == 0
    assert compare("y", labels, one).ok
    assert not compare("y", torch.tensor([3, 1, 7]), one).ok


def test_an_integer_that_float64_decides_otherwise_is_a_tie() -> None:
    one = reference(torch.tensor([3, 0, 7]), torch.tensor([3, 2, 7]))
    assert compare("y", torch.tensor([3, 2, 7]), one).ok
    assert compare("y", torch.tensor([3, 0, 7]), one).ok


def test_a_tie_in_one_element_excuses_no_other_element() -> None:
    one = reference(torch.tensor([0, 3, 5]), torch.tensor([9, 3, 5]))
    assert not compare("y", torch.tensor([0, 0, 0]), one).ok


def test_no_runs_need_no_references() -> None:
    assert make_references([], [], Tolerance()) == []


# --- decisions ---------------------------------------------------------------------------------


def test_a_decision_that_float64_takes_otherwise_does_not_widen_the_budget() -> None:
    for reference in references(Thresholded()):
        budget = torch.as_tensor(reference.budget)
        assert float(budget.max()) < 1e-4


def test_either_decision_is_right_and_a_third_result_is_wrong() -> None:
    (*_, reference) = references(Thresholded())
    otherwise = (reference.expected.double() - reference.exact).abs() > 0.5
    assert otherwise.any()
    assert not otherwise.all()
    assert compare("y", reference.expected, reference).ok
    assert compare("y", reference.exact.float(), reference).ok
    third = torch.where(otherwise, 0.5, reference.expected)
    assert not compare("y", third, reference).ok
    flipped = torch.where(otherwise, reference.expected, reference.expected + 1.1)
    assert not compare("y", flipped, reference).ok
