"""What an accelerator has prepared, and which of its checkpoints it is about to remove."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.adapter import bare
from onnxport.callbacks.spread import IN_PARTS, is_in_parts
from onnxport.callbacks.training import never_raises
from onnxport.errors import ConfigurationError
from onnxport.inputs.observe import quiet_hook
from onnxport.inputs.record import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from onnxport.tree import Example

__all__ = ["KeptCalls", "about_to_go", "prepared", "remove_folder"]

_ELSEWHERE = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
"""What saves weights by itself, in parts."""
TRIES, PAUSE_S = 50, 0.01


def prepared(accelerator: Any, model: nn.Module | None) -> tuple[int, nn.Module, nn.Module]:
    """Return the place of a module among those that were prepared, what is called, the module.

    Args:
        accelerator: The accelerator.
        model: The module, with or without wrappers; ``None``: there is one.

    Raises:
        ConfigurationError: If it is not clear, or each process has a part of it.
    """
    if accelerator.distributed_type.name in _ELSEWHERE:
        raise ConfigurationError(f"{accelerator.distributed_type}: {IN_PARTS}")
    wrapped = list(accelerator._models)  # noqa: SLF001 - has no getter
    modules = [bare(each) for each in wrapped]
    compiles = accelerator.state.dynamo_plugin.backend.value != "NO"
    if model is None and len(modules) == 1 and not compiles:
        place = 0
    elif model is not None and bare(model) in modules:
        place = modules.index(bare(model))
    else:
        raise ConfigurationError(
            f"Which module is exported? {len(modules)} were prepared"
            f"{', to be compiled' if compiles else ''}. Give attach(accelerator, model) one of "
            "them, as accelerator.prepare has returned it."
        )
    if is_in_parts(modules[place]):
        raise ConfigurationError(IN_PARTS)
    # What is compiled is known to nobody but who has called prepare.
    return place, wrapped[place] if model is None else model, modules[place]


class KeptCalls:
    """Keeps a few calls of what is compiled: nothing inside of it can be watched.

    Args:
        wrapped: What is called in training.
        module: The module in it; if that is called itself, nothing is kept here.
    """

    def __init__(self, wrapped: nn.Module, module: nn.Module) -> None:
        self._recorder = Recorder()
        self._handle = None
        if wrapped is not module:
            hook = quiet_hook(self._before)
            self._handle = wrapped.register_forward_pre_hook(hook, with_kwargs=True)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with never_raises("keeping a call"):
            self._recorder.record(args, kwargs, set())

    def example(self) -> list[Example] | None:
        """Return the calls, or ``None``."""
        return self._recorder.examples or None

    def remove(self) -> None:
        """Keep no more of them."""
        if self._handle is not None:
            self._handle.remove()


def about_to_go(accelerator: Any, known: Iterable[str]) -> list[str]:
    """Return which checkpoints the next save will remove before it writes.

    Source: ``accelerate.Accelerator.save_state``, 1.15.

    Args:
        accelerator: The accelerator.
        known: Files of weights, each in the folder of its checkpoint.
    """
    config = accelerator.project_configuration
    root = Path(accelerator.project_dir or ".", "checkpoints")
    if (
        not config.automatic_checkpoint_naming
        or config.total_limit is None
        or not accelerator.is_main_process
        or not root.is_dir()
    ):
        return []
    folders = sorted(root.iterdir(), key=lambda folder: int(re.findall(r"\d+", folder.name)[0]))
    going = set(folders[: max(0, len(folders) + 1 - config.total_limit)])
    return [checkpoint for checkpoint in known if Path(checkpoint).parent in going]


def remove_folder(folder: Path) -> None:
    """Remove a folder in which another process may be at work, which gives up as it notices."""
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(PAUSE_S)
