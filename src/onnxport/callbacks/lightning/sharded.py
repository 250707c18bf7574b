"""Saves of strategies that write each process's part of the weights themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.unsharded import gathered, is_flattened, is_spread, whole_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    Wants = Callable[[str], bool]
    OnSaved = Callable[[dict[str, Any], str], None]
    OnRefused = Callable[[str, str], None]
    OnSaving = Callable[[str], None]

__all__ = [
    "GatheringSave",
    "gather_saves",
    "is_sharded",
    "live_state",
    "load_checkpoint",
    "stand_in",
]

logger = logging.getLogger(__name__)

_UNKNOWN_PARTS = (
    "The strategy has written its weights in parts that cannot be put together here. Make one file "
    "of it and call onnxport.export."
)
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")
_META = "meta.pt"
"""Everything but tensors. Source: ``lightning.fabric.strategies.fsdp._METADATA_FILENAME``."""


class GatheringSave:
    """Takes the place of a strategy's ``save_checkpoint``, in all processes.

    A checkpoint that holds parts of tensors is written by all processes, and never comes to the
    checkpoint plugin. Once it is written, rank zero says whether anybody wants it, and only then do
    all processes put the whole tensors together, one after the other, for rank zero.

    Args:
        strategy: Lightning's strategy.
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.save = strategy.save_checkpoint
        self.listeners: dict[Any, tuple[Wants, OnSaved, OnRefused, OnSaving]] = {}

    def __call__(self, checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Save, gather, report."""
        state = checkpoint.get("state_dict", {})  # the strategy may take it out
        if self.strategy.global_rank == 0:
            for _, _, _, on_saving in tuple(self.listeners.values()):
                on_saving(str(filepath))
        result = self.save(checkpoint, filepath, *args, **kwargs)
        if is_deepspeed(self.strategy):  # it has written the weights of the module, and not these
            try:
                state = live_state(self.strategy)
            except Exception:
                logger.exception("No model for %s. Training goes on.", filepath)
                return result
        if is_spread(state) or is_deepspeed(self.strategy):
            self._report(state, str(filepath))
        elif Path(filepath).is_dir() and self.strategy.global_rank == 0:
            for wants, _, on_refused, _ in tuple(self.listeners.values()):
                if wants(str(filepath)):
                    on_refused(_UNKNOWN_PARTS, str(filepath))
        return result

    def _report(self, state: dict[str, Any], path: str) -> None:
        first = self.strategy.global_rank == 0
        wanting = [
            (on_saved, on_refused)
            for wants, on_saved, on_refused, _ in tuple(self.listeners.values())
            if first and wants(path)
        ]
        if not self.strategy.broadcast(bool(wanting)):  # all processes gather, or none does
            return
        try:
            whole = gathered(state, keep=first)
        except Exception as error:  # of the group, or of what puts them together
            logger.debug("The weights could not be gathered", exc_info=True)
            for _, on_refused in wanting:
                on_refused(f"The weights could not be put together: {error}", path)
            return
        for on_saved, _ in wanting:
            on_saved({"state_dict": whole}, path)


def gather_saves(
    strategy: Any,
    key: Any,
    wants: Wants,
    on_saved: OnSaved,
    on_refused: OnRefused,
    on_saving: OnSaving,
) -> None:
    """Report saves of parts to somebody from now on; to be called in all processes.

    Args:
        strategy: Lightning's strategy.
        key: Who listens; who listens again takes the place of their earlier self.
        wants: Asked on rank zero with the path of a checkpoint that was written. Must not raise.
        on_saved: Called on rank zero with whole tensors and the path. Must not raise.
        on_refused: Called on rank zero with the reason and the path where there are no whole
            tensors. Must not raise.
        on_saving: Called on rank zero with the path before something is saved there. Must not
            raise.
    """
    if not isinstance(strategy.save_checkpoint, GatheringSave):
        strategy.save_checkpoint = GatheringSave(strategy)
    strategy.save_checkpoint.listeners[key] = (wants, on_saved, on_refused, on_saving)


def live_state(strategy: Any) -> dict[str, Any]:
    """Return the weights as they are now, the part of this process.

    Args:
        strategy: Lightning's strategy.
    """
    # DeepSpeed's parameters know how they are put together, and what is detached does not.
    if is_deepspeed(strategy):
        return dict(strategy.lightning_module.state_dict(keep_vars=True))
    if is_flattened(strategy.model):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        # Not Lightning's, which may hold the whole weights at once.
        return dict(get_model_state_dict(strategy.model))
    return dict(strategy.lightning_module.state_dict())


def load_checkpoint(strategy: Any, path: str) -> dict[str, Any]:
    """Load a checkpoint with whole tensors, in this process alone.

    Args:
        strategy: Lightning's strategy.
        path: A file, or a folder with the parts of all processes.
    """
    folder = Path(path)
    if is_deepspeed(strategy):
        return _consolidated(folder, strategy.lightning_module)
    if not folder.is_dir():
        content: dict[str, Any] = strategy.checkpoint_io.load_checkpoint(
            path, map_location="cpu", weights_only=False
        )
        return content
    # This training has written it, a moment ago.
    rest = torch.load(folder / _META, map_location="cpu", weights_only=False)  # nosec
    return {**rest, "state_dict": read_state_dict(folder)}


def is_sharded(strategy: Any) -> bool:
    """Tell whether each rank holds a part of the weights only."""
    return any(word in kind.__name__ for kind in type(strategy).__mro__ for word in _SHARDED)


def is_deepspeed(strategy: Any) -> bool:
    """Tell whether DeepSpeed writes the checkpoints, a folder each."""
    return any(kind.__name__ == "DeepSpeedStrategy" for kind in type(strategy).__mro__)


def _consolidated(folder: Path, module: nn.Module) -> dict[str, Any]:
    """Put together what the processes of DeepSpeed have written."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    parts = folder / "checkpoint"  # Lightning's tag
    # This training has written it, a moment ago.
    facts = torch.load(  # nosec
        min(parts.glob("*model_states.pt")), map_location="cpu", mmap=True, weights_only=False
    )
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=parts.name)
    kinds = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    # The optimizer keeps float32 of weights that are used in half precision.
    whole = {name: tensor.to(kinds.get(name, tensor.dtype)) for name, tensor in state.items()}
    return {**facts, "state_dict": whole}


def stand_in(trainer: Any, state: Mapping[str, Any]) -> nn.Module | None:
    """Return what stands for a module that takes all processes to run; ``None``: it runs alone.

    Args:
        trainer: Lightning's trainer.
        state: Whole tensors.

    Raises:
        Exception: Whatever copying the user's attributes raises.
    """
    module, flat = trainer.lightning_module, is_flattened(trainer.strategy.model)
    spread = flat or is_spread(dict(module.named_parameters()))
    return whole_module(module, state, flat=flat) if spread else None
