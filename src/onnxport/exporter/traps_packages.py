"""Traps in other packages' models, known by what their modules have, not by an import."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.utils import rnn

from onnxport.exporter.traps_torch import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = [
    "absent_masks",
    "batched_experts",
    "eager_masks",
    "handles_empty_rows",
    "rows_without_steps",
    "settings",
]

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


@contextmanager
def absent_masks(_: nn.Module) -> Iterator[None]:
    """Transformers leaves out a mask that masks nothing, as it does outside of an export."""
    masks = sys.modules.get("transformers.masking_utils")
    name = "_ignore_bidirectional_mask_sdpa"
    ignore = getattr(masks, name, None)
    if ignore is None:
        yield
        return

    def masks_nothing(
        padding: Any, length: Any, window: Any = None, *rest: Any, **more: Any
    ) -> Any:
        if padding is None and window is None:
            return True
        return ignore(padding, length, window, *rest, **more)

    with replaced(masks, name, masks_nothing):
        yield


def handles_empty_rows(module: nn.Module) -> bool:
    """Tell whether a module has pytorch-forecasting's recurrent layers."""
    return any(hasattr(type(submodule), "handle_no_encoding") for submodule in module.modules())


@contextmanager
def rows_without_steps(module: nn.Module) -> Iterator[None]:
    """pytorch-forecasting's recurrent layers handle rows of length 0, if there are any or not.

    In a trace, the question whether there are any would keep the example's answer.
    """

    def forward(
        self: Any, x: Any, hx: Any = None, lengths: Any = None, enforce_sorted: bool = True
    ) -> Any:
        # That of nn.LSTM or nn.GRU, past the package's own.
        recurrent = super(type(self).__mro__[1], self).forward  # type: ignore[arg-type]
        if isinstance(x, rnn.PackedSequence) or lengths is None:
            return recurrent(x, hx=hx)
        packed = rnn.pack_padded_sequence(
            x,
            lengths.clamp(min=1).cpu(),
            enforce_sorted=enforce_sorted,
            batch_first=self.batch_first,
        )
        output, state = recurrent(packed, hx=hx)
        start = self.init_hidden_state(x) if hx is None else hx
        state = self.handle_no_encoding(state, (lengths == 0)[None, :, None], start)
        return rnn.pad_packed_sequence(output, batch_first=self.batch_first)[0], state

    kinds = {type(one) for one in module.modules() if hasattr(type(one), "handle_no_encoding")}
    owners = {next(kind for kind in one.__mro__ if "forward" in vars(kind)) for one in kinds}
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(replaced(owner, "forward", forward))
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
