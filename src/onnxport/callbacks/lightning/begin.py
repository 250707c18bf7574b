"""What is known of a Lightning training when it begins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.lightning.facts import (
    checkpoint_roots,
    is_redirected,
    run_address,
    run_folder,
    shows_in_rich,
)
from onnxport.callbacks.lightning.names import teller
from onnxport.callbacks.place import has_the_place
from onnxport.callbacks.remote import folder_here, is_remote
from onnxport.callbacks.training import Training

if TYPE_CHECKING:
    from onnxport.callbacks.settings import ExportCallback

__all__ = ["training_of"]


def training_of(trainer: Any, callback: ExportCallback, root: str, place: str | None) -> Training:
    """Return what is known of a training, in the process that makes its models.

    Args:
        trainer: Lightning's trainer.
        callback: The callback.
        root: Folder of the run; may be a URL.
        place: What follows the names of the models; ``None``: another callback has them.
    """
    roots, module = checkpoint_roots(trainer), trainer.lightning_module
    here = [Path(folder) for folder in roots if not is_remote(folder)]
    return Training(
        module=module,
        root=root,
        roots=roots,
        address=partial(run_address, trainer, callback.settings.mlflow),
        page=run_folder(trainer, folder_here(root)),
        goes_on=trainer.ckpt_path is not None,
        place=place,
        is_ours=partial(has_the_place, callback, trainer.callbacks, here),
        is_redirected=is_redirected,
        fallback=lambda: getattr(module, "example_input_array", None),
        say=teller(type(callback)),
        in_rich=shows_in_rich(trainer),
        leaves_files=not trainer.fast_dev_run,
    )
