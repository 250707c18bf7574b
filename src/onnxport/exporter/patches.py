"""Known traps on the way through torch's exporters, and what takes each of them away.

A patch changes torch for the time of one export, on the copy that belongs to the export, and only
after an attempt showed its symptom. It never changes what the module computes beyond rounding: the
proof compares with the module as it runs without any patch.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

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


@contextmanager
def _math_attention(_: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products: the fused form decomposes into a view that cannot be."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _given_causality(_: nn.Module) -> Iterator[None]:
    """Transformer layers take ``is_causal`` as given instead of comparing the mask's values."""
    from torch.nn.modules import transformer

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:  # noqa: ARG001
        return bool(is_causal)

    # Both readings compute the same: the mask itself is always given too.
    with _replaced(transformer, "_detect_is_causal_mask", detect):
        yield


@contextmanager
def _unchecked_distributions(_: nn.Module) -> Iterator[None]:
    """``torch.distributions`` does not look at the values of its parameters."""
    from torch.distributions import Distribution

    before = Distribution._validate_args  # noqa: SLF001 - the setter has no getter
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def _baked_parametrizations(module: nn.Module) -> Iterator[None]:
    """Parametrized weights (weight norm, spectral norm, orthogonal) become plain tensors.

    The class of the module is swapped for the one it had before: ``remove_parametrizations`` would
    delete a property from a class that a live module may share.
    """
    with ExitStack() as undo:
        for submodule in list(module.modules()):
            if not parametrize.is_parametrized(submodule):
                continue
            names = list(submodule.parametrizations)  # type: ignore[arg-type]
            values = {name: getattr(submodule, name).detach().clone() for name in names}
            kind = type(submodule)
            held = submodule._modules.pop("parametrizations")  # noqa: SLF001
            submodule.__class__ = kind.__mro__[1]
            for name, value in values.items():
                submodule.register_buffer(name, value)

            def restore(
                submodule: nn.Module = submodule,
                kind: type = kind,
                held: Any = held,
                names: list[str] = names,
            ) -> None:
                for name in names:
                    submodule._buffers.pop(name)  # noqa: SLF001
                submodule.__class__ = kind
                submodule._modules["parametrizations"] = held  # noqa: SLF001

            undo.callback(restore)
        yield


@contextmanager
def _eager_masks(module: nn.Module) -> Iterator[None]:
    """Transformers' models compute attention and masks with plain operators.

    Their default masks are built with ``vmap`` or with fused attention's rules, which the tracer
    cannot follow.
    """
    changed: list[tuple[Any, Any]] = []
    for submodule in module.modules():
        config: Any = getattr(submodule, "config", None)
        chosen = getattr(config, "_attn_implementation", None)
        if chosen is not None and chosen != "eager":
            changed.append((config, chosen))
            config._attn_implementation = "eager"  # noqa: SLF001 - what set_attn_implementation sets
    try:
        yield
    finally:
        for config, chosen in changed:
            config._attn_implementation = chosen  # noqa: SLF001


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="math attention",
        symptom=re.compile(r"Cannot view a tensor with shape|scaled_dot_product"),
        apply=_math_attention,
        source="pytorch/pytorch#136543, #141107",
    ),
    Patch(
        name="given causality",
        symptom=re.compile(
            r"_detect_is_causal_mask|is_causal must be bool|'is_causal' must be bool"
            r"|torch/nn/modules/transformer\.py"
        ),
        apply=_given_causality,
        source="pytorch/pytorch#153955, #110255",
    ),
    Patch(
        name="unchecked distributions",
        symptom=re.compile(r"torch/distributions/|validate_args"),
        apply=_unchecked_distributions,
        source="torch.distributions.Distribution.set_default_validate_args",
    ),
    Patch(
        name="baked parametrizations",
        symptom=re.compile(r"parametriz|weight_norm|_weight_norm|linalg_qr|householder|matrix_exp"),
        apply=_baked_parametrizations,
        source="torch.nn.utils.parametrize",
    ),
    Patch(
        name="eager attention",
        symptom=re.compile(r"masking_utils|vmap|sdpa_mask|sdpa_attention|functorch"),
        apply=_eager_masks,
        source="transformers.PreTrainedModel.set_attn_implementation",
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
        configs = (getattr(submodule, "config", None) for submodule in module.modules())
        chosen = {getattr(config, "_attn_implementation", None) for config in configs}
        return bool(chosen - {None, "eager"})
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
