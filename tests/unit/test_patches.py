"""Ways around known traps: torch is changed only for as long as one export runs."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Distribution, Normal
from torch.nn.modules import transformer
from torch.nn.utils import parametrizations, parametrize

from onnxport.exporter.patches import PATCHES, applied, patches_for, text_of

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = [patch.name for patch in PATCHES]
BAKED = "baked parametrizations"


class Configured(nn.Module):
    """Has a configuration as the models of transformers have."""

    def __init__(self, chosen: str | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=chosen)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU())


def spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv1d(2, 3, 2)), nn.Flatten())


def orthogonal() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), parametrizations.orthogonal(nn.Linear(4, 3)))


def both_weights() -> nn.Module:
    linear = nn.Linear(4, 3)
    parametrize.register_parametrization(linear, "weight", Doubled())
    parametrize.register_parametrization(linear, "bias", Doubled())
    return linear


def chained() -> nn.Module:
    linear = nn.Linear(4, 3)
    parametrize.register_parametrization(linear, "weight", Doubled())
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


def recurrent() -> nn.Module:
    return parametrizations.weight_norm(nn.GRUCell(4, 3), "weight_hh")


PARAMETRIZED = [weight_norm, spectral_norm, orthogonal, both_weights, chained, recurrent]
parametrized = pytest.mark.parametrize("make", PARAMETRIZED, ids=lambda make: make.__name__)


def example(module: nn.Module) -> torch.Tensor:
    convolution = any(isinstance(part, nn.Conv1d) for part in module.modules())
    return torch.randn(5, 2, 4) if convolution else torch.randn(5, 4)


def torch_now() -> tuple[Any, ...]:
    """What patches change in torch."""
    return (
        transformer._detect_is_causal_mask,
        Distribution._validate_args,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def state_of(module: nn.Module) -> dict[str, Any]:
    """Classes, the places of tensors and the tensors themselves, in order."""
    return {
        "kinds": [(name, type(part)) for name, part in module.named_modules()],
        "identities": [(name, id(part)) for name, part in module.named_modules()],
        "parameters": [(name, id(value)) for name, value in module.named_parameters()],
        "buffers": [(name, id(value)) for name, value in module.named_buffers()],
        "keys": list(module.state_dict()),
        "values": [value.tolist() for value in module.state_dict().values()],
    }


def error_of(function: Callable[[], Any]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one differs between releases
        function()
    return text_of(caught.value)


# --- only inside of the context ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_is_undone_when_its_block_ends(name: str) -> None:
    before = torch_now()
    with applied([name], nn.Linear(2, 2)):
        pass
    assert torch_now() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_is_undone_when_its_block_raises(name: str) -> None:
    before, module = torch_now(), weight_norm()
    state = state_of(module)
    with pytest.raises(KeyError, match="export"), applied([name], module):
        raise KeyError("export")
    assert torch_now() == before
    assert state_of(module) == state


def test_all_patches_together_are_undone_when_their_block_raises() -> None:
    module = nn.Sequential(weight_norm(), Configured("sdpa"))
    before, state = torch_now(), state_of(module)

    def fail() -> None:
        assert torch_now() != before
        raise KeyError("export")

    with pytest.raises(KeyError, match="export"), applied(NAMES, module):
        fail()
    assert torch_now() == before
    assert state_of(module) == state
    assert module[1].config._attn_implementation == "sdpa"


def test_a_patch_of_another_name_changes_nothing() -> None:
    before, module = torch_now(), weight_norm()
    state = state_of(module)
    with applied(["of another version"], module):
        assert torch_now() == before
        assert state_of(module) == state


def test_attention_is_computed_by_plain_operators_inside_only() -> None:
    assert torch.backends.cuda.flash_sdp_enabled()
    query = torch.randn(1, 2, 4, 8)
    plain = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    with applied(["math attention"], nn.Identity()):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        patched = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(patched, plain)


def test_masks_are_not_compared_inside_only() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    with applied(["given causality"], nn.Identity()):
        assert transformer._detect_is_causal_mask(mask, None, 3) is False
        assert transformer._detect_is_causal_mask(mask, True, 3) is True
    assert transformer._detect_is_causal_mask(mask, None, 3) is True


def test_a_causal_encoder_gives_the_same_result_under_given_causality() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    plain = encoder(x, mask)
    with applied(["given causality"], encoder):
        patched = encoder(x, mask)
    torch.testing.assert_close(patched, plain)


@pytest.mark.parametrize("checked", [True, False])
def test_distributions_are_checked_again_only_if_they_were(checked: bool) -> None:
    before = Distribution._validate_args
    Distribution.set_default_validate_args(checked)
    try:
        with applied(["unchecked distributions"], nn.Identity()):
            Normal(torch.zeros(1), -torch.ones(1))
        assert Distribution._validate_args is checked
    finally:
        Distribution.set_default_validate_args(before)


def test_eager_attention_is_chosen_inside_only_and_shared_configurations_are_put_back() -> None:
    parts = [Configured("sdpa"), Configured("eager"), Configured(None), Configured("flex")]
    twin = Configured("sdpa")
    twin.config = parts[0].config
    module = nn.Sequential(*parts, twin, nn.Linear(2, 2))
    with applied(["eager attention"], module):
        chosen = [part.config._attn_implementation for part in parts]
        assert chosen == ["eager", "eager", None, "eager"]
    chosen = [part.config._attn_implementation for part in (*parts, twin)]
    assert chosen == ["sdpa", "eager", None, "flex", "sdpa"]


def test_the_parts_of_a_configuration_get_back_what_each_had() -> None:
    transformers = pytest.importorskip("transformers")
    model, text = Configured(None), Configured(None)
    model.config = transformers.CLIPConfig()
    model.text = text
    text.config = model.config.text_config
    model.config._attn_implementation = "sdpa"
    text.config._attn_implementation = "flex_attention"
    with applied(["eager attention"], model):
        assert text.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert text.config._attn_implementation == "flex_attention"


def test_experts_are_batched_inside_only() -> None:
    module = Configured(None)
    module.config._experts_implementation = "grouped_mm"
    assert patches_for("grouped_mm_fallback", module) == {"batched experts"}
    with applied(["batched experts"], module):
        assert module.config._experts_implementation == "batched_mm"
    assert module.config._experts_implementation == "grouped_mm"
    assert patches_for("grouped_mm_fallback", nn.Linear(1, 1)) == frozenset()


# --- functions written out --------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind",
    [nn.GRUCell, nn.LSTMCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)],
)
def test_plain_cells_compute_the_same(kind: Callable[..., nn.Module], bias: bool) -> None:
    cell = kind(3, 5, bias=bias)
    rows, state = torch.randn(4, 3), torch.randn(4, 5)
    states = (state, torch.randn(4, 5)) if isinstance(cell, nn.LSTMCell) else state
    kind_before = type(cell)
    plain, plain_first = cell(rows, states), cell(rows[0])
    with applied(["plain cells"], cell):
        assert type(cell) is not kind_before
        torch.testing.assert_close(cell(rows, states), plain)
        torch.testing.assert_close(cell(rows[0]), plain_first)
    assert type(cell) is kind_before


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    out=st.tuples(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 9))),
)
def test_plain_adaptive_pooling_computes_the_same(size: Any, out: Any) -> None:
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    pool, line = nn.AdaptiveAvgPool2d(out), nn.AdaptiveAvgPool1d(out[0])
    plain, plain_line = pool(image), line(image[0])
    with applied(["plain adaptive pooling"], pool):
        torch.testing.assert_close(pool(image), plain)
        torch.testing.assert_close(line(image[0]), plain_line)


@pytest.mark.parametrize("shapes", [((4, 5), (4, 2)), ((4, 5, 3), (4, 2, 1)), ((1, 5), (4, 2))])
@pytest.mark.parametrize("dim", [1, None])
def test_plain_take_along_dim_computes_the_same(shapes: Any, dim: int | None) -> None:
    x, index = torch.randn(shapes[0]), torch.randint(5, shapes[1])
    plain = torch.take_along_dim(x, index, dim)
    with applied(["plain take_along_dim"], nn.Identity()):
        assert torch.equal(torch.take_along_dim(x, index, dim), plain)
        assert torch.equal(x.take_along_dim(index, dim), plain)


def test_round_takes_a_tensor_inside_only_and_rounds_as_python_does() -> None:
    with applied(["rounded sizes"], nn.Identity()):
        assert [round(torch.tensor(x)).item() for x in (0.5, 1.5, 2.5, 2.6)] == [0, 2, 2, 3]
        assert float(round(torch.tensor(1.26), 1)) == pytest.approx(1.3)
    with pytest.raises(TypeError):
        round(torch.tensor(1.0))


# --- parametrized weights ---------------------------------------------------------------------


@parametrized
def test_baked_weights_give_the_same_result(make: Callable[[], nn.Module]) -> None:
    module = make().eval()
    x = example(module)
    plain = module(x)
    with applied([BAKED], module):
        assert not any(parametrize.is_parametrized(part) for part in module.modules())
        torch.testing.assert_close(module(x), plain)
    assert torch.equal(module(x), plain)


@parametrized
def test_a_parametrized_module_is_exactly_what_it_was_afterwards(
    make: Callable[[], nn.Module],
) -> None:
    module = make().eval()
    before = state_of(module)
    with applied([BAKED], module):
        assert state_of(module) != before
    assert state_of(module) == before


@parametrized
def test_a_parametrized_module_is_what_it_was_after_an_exception_too(
    make: Callable[[], nn.Module],
) -> None:
    module = make().eval()
    before = state_of(module)
    with pytest.raises(KeyError, match="export"), applied([BAKED], module):
        raise KeyError("export")
    assert state_of(module) == before


@parametrized
def test_a_copy_of_the_module_is_not_touched(make: Callable[[], nn.Module]) -> None:
    live = make().eval()
    module = copy.deepcopy(live)
    x = example(live)
    plain, before = live(x), state_of(live)
    with applied([BAKED], module):
        assert state_of(live) == before
        assert torch.equal(live(x), plain)
    assert state_of(live) == before


@parametrized
def test_a_module_that_was_baked_can_still_be_trained(make: Callable[[], nn.Module]) -> None:
    module = make()
    with applied([BAKED], module):
        pass
    module(example(module)).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_parts_that_were_added_after_a_parametrization_keep_their_place() -> None:
    linear = parametrizations.weight_norm(nn.Linear(2, 2))
    linear.extra = nn.Linear(1, 1)
    before = list(linear.state_dict())
    with applied([BAKED], linear):
        pass
    assert list(linear.state_dict()) == before


def test_a_module_that_stands_in_two_places_is_baked_once_and_put_back() -> None:
    shared = parametrizations.weight_norm(nn.Linear(4, 4))
    module = nn.Sequential(shared, nn.ReLU(), shared)
    x, before = torch.randn(2, 4), state_of(module)
    plain = module(x)
    with applied([BAKED], module):
        torch.testing.assert_close(module(x), plain)
    assert state_of(module) == before


def test_a_parametrized_module_inside_of_a_parametrized_one_is_baked_too() -> None:
    outer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    parametrizations.weight_norm(outer.linear1)
    parametrize.register_parametrization(outer.self_attn, "in_proj_weight", Doubled())
    x, before = torch.randn(2, 3, 4), state_of(outer)
    plain = outer(x)
    with applied([BAKED], outer):
        assert not any(parametrize.is_parametrized(part) for part in outer.modules())
        torch.testing.assert_close(outer(x), plain)
    assert state_of(outer) == before


def test_modules_without_parametrizations_keep_their_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = state_of(module)
    with applied([BAKED], module):
        assert state_of(module) == before


# --- which one for which error ----------------------------------------------------------------


def test_a_failed_check_of_a_distribution_asks_for_unchecked_distributions() -> None:
    text = error_of(lambda: Normal(torch.zeros(1), -torch.ones(1), validate_args=True))
    assert patches_for(text, nn.Identity()) == {"unchecked distributions"}


def test_a_view_that_cannot_be_asks_for_plain_attention() -> None:
    text = error_of(lambda: torch._refs.view(torch.zeros(2, 3).t(), (6,)))
    assert "Cannot view a tensor with shape" in text
    assert patches_for(text, nn.Identity()) == {"math attention"}


def test_an_error_in_attention_asks_for_plain_attention() -> None:
    wrong = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)
    text = error_of(
        lambda: nn.functional.scaled_dot_product_attention(wrong[0], wrong[1], wrong[1])
    )
    assert "math attention" in patches_for(text, nn.Identity())


def test_an_error_below_a_transformer_layer_asks_for_given_causality() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    text = error_of(lambda: layer(torch.zeros(3, 2, 7)))
    assert "given causality" in patches_for(text, layer)


def test_an_error_below_a_vectorised_mask_asks_for_eager_attention() -> None:
    text = error_of(lambda: torch.vmap(lambda x: x.item())(torch.zeros(3)))
    assert "eager attention" in patches_for(text, Configured("sdpa"))


def test_an_error_below_a_parametrization_asks_for_baked_weights() -> None:
    class Refusing(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            if weight.sum() > 1e9:
                raise ValueError("not reached")
            return weight

    linear = nn.Linear(2, 2)
    parametrize.register_parametrization(linear, "weight", Refusing())
    text = error_of(lambda: torch.export.export(linear, (torch.zeros(1, 2),)))
    assert BAKED in patches_for(text, linear)


@pytest.mark.parametrize("text", ["", "ValueError: no", "the model has 3 outputs"])
def test_an_error_without_a_symptom_asks_for_nothing(text: str) -> None:
    assert patches_for(text, nn.Sequential(weight_norm(), Configured("sdpa"))) == frozenset()


def test_patches_that_do_not_concern_a_module_are_not_chosen() -> None:
    text = "parametrize weight_norm masking_utils vmap"
    assert patches_for(text, nn.Linear(2, 2)) == frozenset()
    assert patches_for(text, nn.Sequential(Configured("eager"), Configured(None))) == frozenset()
    assert patches_for(text, weight_norm()) == {BAKED}
    assert patches_for(text, nn.Sequential(Configured("sdpa"))) == {"eager attention"}


def test_the_text_of_an_error_names_the_files_and_causes_that_led_to_it() -> None:
    def fail() -> None:
        try:
            Normal(torch.zeros(1), -torch.ones(1), validate_args=True)
        except ValueError as error:
            raise RuntimeError("export failed") from error

    text = error_of(fail)
    assert "export failed" in text
    assert "torch/distributions/" in text.replace("\\", "/")


def test_the_docs_name_every_patch() -> None:
    text = (Path(__file__).parents[2] / "docs" / "any-model.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| ([^|`]+) \|", text, flags=re.MULTILINE))
    assert set(NAMES) <= rows


def test_each_patch_has_a_name_of_its_own_and_says_where_its_trap_is_described() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(patch.source for patch in PATCHES)
    assert not any("," in name or "/" in name for name in NAMES)
