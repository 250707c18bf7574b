"""Known traps on the way through torch's exporters, and what takes each of them away.

A patch changes torch for the time of one export, on the copy that belongs to the export, and only
after an attempt showed its symptom. It never changes what the module computes beyond rounding: the
proof compares with the module as it runs without any patch.
"""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils import parametrize

from onnxport.exporter import traps_einx, traps_packages, traps_torch, traps_tracing
from onnxport.exporter.traps_packages import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager


__all__ = ["PATCHES", "Patch", "applied", "patches_for", "text_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One trap and the way around it.

    Args:
        name: A few words for the report.
        symptom: Matches the text of the errors that the trap causes.
        apply: Makes the context in which the export runs; gets the module that is exported.
        source: Where the trap is described upstream.
        concerns: Tells whether the patch can make a difference to a module.
    """

    name: str
    symptom: re.Pattern[str]
    apply: Callable[[nn.Module], AbstractContextManager[None]]
    source: str
    concerns: Callable[[nn.Module], bool] = lambda _: True


def _is_parametrized(module: nn.Module) -> bool:
    return any(parametrize.is_parametrized(submodule) for submodule in module.modules())


def _has_fused_attention(module: nn.Module) -> bool:
    chosen = {value for _, value in settings(module, traps_packages.ATTENTION)}
    return bool(chosen - {"eager"})


def _has(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: any(isinstance(submodule, kind) for submodule in module.modules())


def _has_setting(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: bool(settings(module, name))


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="math attention",
        symptom=re.compile(r"Cannot view a tensor with shape|scaled_dot_product"),
        apply=traps_torch.math_attention,
        source="pytorch/pytorch#136543, #141107",
    ),
    Patch(
        name="given causality",
        symptom=re.compile(
            r"_detect_is_causal_mask|is_causal must be bool|'is_causal' must be bool"
            r"|torch/nn/modules/transformer\.py"
        ),
        apply=traps_torch.given_causality,
        source="pytorch/pytorch#153955, #110255",
    ),
    Patch(
        name="unchecked distributions",
        symptom=re.compile(r"torch/distributions/|validate_args"),
        apply=traps_torch.unchecked_distributions,
        source="torch.distributions.Distribution.set_default_validate_args",
    ),
    Patch(
        name="baked parametrizations",
        symptom=re.compile(r"parametriz|weight_norm|_weight_norm|linalg_qr|householder|matrix_exp"),
        apply=traps_torch.baked_parametrizations,
        source="torch.nn.utils.parametrize",
        concerns=_is_parametrized,
    ),
    Patch(
        name="eager attention",
        symptom=re.compile(r"masking_utils|vmap|sdpa_mask|sdpa_attention|functorch"),
        apply=traps_packages.eager_masks,
        source="transformers.PreTrainedModel.set_attn_implementation",
        concerns=_has_fused_attention,
    ),
    Patch(
        name="batched experts",
        symptom=re.compile(r"grouped_mm|histc|integrations/moe\.py|experts"),
        apply=traps_packages.batched_experts,
        source="transformers.integrations.moe.ExpertsInterface",
        concerns=_has_setting(traps_packages.EXPERTS),
    ),
    Patch(
        name="plain cells",
        symptom=re.compile(r"(?:gru|lstm|rnn_tanh|rnn_relu)_cell"),
        apply=traps_torch.plain_cells,
        source="torch.onnx has no symbolic for aten::gru_cell",
        concerns=_has(nn.RNNCellBase),
    ),
    Patch(
        name="plain adaptive pooling",
        symptom=re.compile(r"adaptive_avg_pool"),
        apply=traps_torch.plain_adaptive_pooling,
        source="pytorch/pytorch#42653",
    ),
    Patch(
        name="plain take_along_dim",
        symptom=re.compile(r"take_along_dim"),
        apply=traps_torch.plain_take_along_dim,
        source="torch.take_along_dim",
    ),
    Patch(
        name="rounded sizes",
        symptom=re.compile(r"__round__|built-?in function round|builtins\.round"),
        apply=traps_tracing.rounded_sizes,
        source="torch.Tensor has no __round__",
    ),
    Patch(
        name="symbolic len",
        symptom=re.compile(r"static shape of|is fixed to|should be dynamic|[Oo]nnx[Rr]untime"),
        apply=traps_tracing.symbolic_len,
        source="torch.Tensor.__len__ under torch.jit.trace",
        concerns=traps_tracing.asks_for_len,
    ),
    Patch(
        name="read packed outputs",
        symptom=re.compile(r"vector::_M_range_check"),
        apply=traps_tracing.read_packed_outputs,
        source="torch/csrc/jit/passes/onnx/peephole.cpp, pushPackingPastRnn",
        concerns=_has(nn.RNNBase),
    ),
    Patch(
        name="full index_put",
        symptom=re.compile(r"marked single but has an empty string"),
        apply=traps_tracing.full_index_put,
        source="torch.onnx symbolic_opset11.index_put takes no None among the indices",
    ),
    Patch(
        name="symbolic einx",
        symptom=re.compile(""),  # sizes are lost without a word
        apply=traps_einx.symbolic_einx,
        source="einx/_src/frontend/impl/torch.py, get_shape",
        concerns=traps_einx.uses_einx,
    ),
    Patch(
        name="known scalars",
        symptom=re.compile(r"Could not guard on data-dep|Could not extract specialized integer"),
        apply=traps_torch.known_scalars,
        source="torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode",
        concerns=traps_torch.has_scalars,
    ),
    Patch(
        name="plain distances",
        symptom=re.compile(r"cdist"),
        apply=traps_torch.plain_distances,
        source="torch.onnx has no translation of aten::_cdist_forward",
    ),
    Patch(
        name="absent masks",
        symptom=re.compile(r"attention_mask|is invalid for input of size"),
        apply=traps_packages.absent_masks,
        source="transformers.masking_utils, is_torchdynamo_exporting()",
        concerns=_has_setting(traps_packages.ATTENTION),
    ),
    Patch(
        name="rows without steps",
        symptom=re.compile(r"pytorch_forecasting|vector::_M_range_check"),
        apply=traps_packages.rows_without_steps,
        source="pytorch_forecasting.models.nn.rnn",
        concerns=traps_packages.handles_empty_rows,
    ),
)
"""In the order in which they are applied."""


def patches_for(text: str, module: nn.Module) -> frozenset[str]:
    """Return the names of the patches whose symptom shows in an error and that concern a module."""
    return frozenset(
        patch.name for patch in PATCHES if patch.symptom.search(text) and patch.concerns(module)
    )


@contextmanager
def applied(names: Iterable[str], module: nn.Module) -> Iterator[None]:
    """Run the block with some patches."""
    wanted = set(names)
    with ExitStack() as stack:
        for patch in PATCHES:
            if patch.name in wanted:
                stack.enter_context(patch.apply(module))
        yield


def text_of(error: BaseException) -> str:
    """Return everything that an error says, with the files that its traceback went through."""
    import traceback

    return "".join(traceback.format_exception(error))
