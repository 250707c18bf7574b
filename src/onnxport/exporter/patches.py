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

from torch.nn.utils import parametrize

from onnxport.exporter import traps_packages, traps_torch
from onnxport.exporter.traps_packages import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from torch import nn

__all__ = ["PATCHES", "Patch", "applied", "patches_for", "text_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One trap and the way around it.

    Args:
        name: A few words for the report.
        symptom: Matches the text of the errors that the trap causes.
        apply: Makes the context in which the export runs; gets the module that is exported.
        source: Where the trap is described upstream.
    """

    name: str
    symptom: re.Pattern[str]
    apply: Callable[[nn.Module], AbstractContextManager[None]]
    source: str


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
    ),
    Patch(
        name="eager attention",
        symptom=re.compile(r"masking_utils|vmap|sdpa_mask|sdpa_attention|functorch"),
        apply=traps_packages.eager_masks,
        source="transformers.PreTrainedModel.set_attn_implementation",
    ),
    Patch(
        name="batched experts",
        symptom=re.compile(r"grouped_mm|histc|integrations/moe\.py|experts"),
        apply=traps_packages.batched_experts,
        source="transformers.integrations.moe.ExpertsInterface",
    ),
    Patch(
        name="plain cells",
        symptom=re.compile(r"(?:gru|lstm|rnn_tanh|rnn_relu)_cell"),
        apply=traps_torch.plain_cells,
        source="torch.onnx has no symbolic for aten::gru_cell, pytorch/pytorch#47887",
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
        apply=traps_torch.rounded_sizes,
        source="torch.Tensor has no __round__",
    ),
)
"""In the order in which they are applied."""


def patches_for(text: str, module: nn.Module) -> frozenset[str]:
    """Return the names of the patches whose symptom shows in an error and that concern a module."""
    return frozenset(
        patch.name
        for patch in PATCHES
        if patch.symptom.search(text) and _concerns(patch.name, module)
    )


def _concerns(name: str, module: nn.Module) -> bool:
    if name == "baked parametrizations":
        return any(parametrize.is_parametrized(submodule) for submodule in module.modules())
    if name == "eager attention":
        chosen = {value for _, value in settings(module, traps_packages.ATTENTION)}
        return bool(chosen - {"eager"})
    if name == "batched experts":
        return bool(settings(module, traps_packages.EXPERTS))
    return True


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
