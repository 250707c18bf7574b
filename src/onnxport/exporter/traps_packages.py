"""Traps in other packages' models, known by what their modules have, not by an import."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["batched_experts", "eager_masks", "settings"]

ATTENTION, EXPERTS = "_attn_implementation", "_experts_implementation"


@contextmanager
def eager_masks(module: nn.Module) -> Iterator[None]:
    """Transformers' models compute attention and masks with plain operators.

    Their default masks are built with ``vmap`` or with fused attention's rules, which the tracer
    cannot follow.
    """
    with _chosen(module, ATTENTION, "eager"):
        yield


@contextmanager
def batched_experts(module: nn.Module) -> Iterator[None]:
    """Transformers' mixtures of experts gather the weights of each token's experts.

    Their default is an operator of their own, and the eager form loops over the experts that were
    hit.
    """
    with _chosen(module, EXPERTS, "batched_mm"):
        yield


def settings(module: nn.Module, name: str) -> list[tuple[Any, Any]]:
    """Return every configuration below a module that has a setting, and the setting.

    A configuration comes before its parts, which its setter may set, too.
    """
    found: dict[int, tuple[Any, Any]] = {}

    def walk(config: Any) -> None:
        if id(config) in found or getattr(config, name, None) is None:
            return
        found[id(config)] = (config, getattr(config, name))
        for part in list(getattr(config, "__dict__", {}).values()):
            if hasattr(part, "__dict__"):
                walk(part)

    for submodule in module.modules():
        walk(getattr(submodule, "config", None))
    return list(found.values())


@contextmanager
def _chosen(module: nn.Module, name: str, value: str) -> Iterator[None]:
    before = settings(module, name)
    for config, _ in before:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, chosen in before:
            setattr(config, name, chosen)
