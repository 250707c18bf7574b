"""Calls of a module outside of training: what a data module's batches become on their way to it."""

from __future__ import annotations

import importlib
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from onnxport.callbacks.lightning.facts import is_redirected
from onnxport.callbacks.lightning.names import framework_of
from onnxport.errors import InputInferenceError
from onnxport.exporter.module_state import copy_module
from onnxport.inputs.observe import Observer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from onnxport.tree import Example

__all__ = ["is_own", "observed_calls", "silent"]

logger = logging.getLogger(__name__)

BATCHES = 3
"""How many are run."""
_STEPS = (("validate", "validation_step"), ("test", "test_step"), ("predict", "predict_step"))


def observed_calls(module: nn.Module, datamodule: Any) -> tuple[str, list[Example]]:
    """Run a few batches of a data module, as a trainer does, on a copy of the module.

    Args:
        module: A ``LightningModule``.
        datamodule: A ``LightningDataModule``.

    Returns:
        The name of the submodule that was called (``""``: the module itself), and its calls.

    Raises:
        InputInferenceError: If nothing was called.
    """
    framework = framework_of(type(module)) or framework_of(type(datamodule))
    if framework is None:
        raise InputInferenceError(
            f"{type(module).__name__} is no LightningModule, so there is no step that takes a "
            "batch to it. Give --shape or --example."
        )
    lightning = importlib.import_module(framework)
    copy = copy_module(module)
    observer = Observer(copy, is_redirected=is_redirected)
    tried = []
    for verb, step in _STEPS:
        if not is_own(module, step):
            continue
        with silent(framework):
            trainer = _trainer(lightning, observer)
        observer.start()
        try:
            with silent(framework):
                getattr(trainer, verb)(copy, datamodule=datamodule, **_options(verb))
        except Exception as error:  # the user's steps and data
            logger.debug("%s could not be run.", step, exc_info=True)
            tried.append(f"{step} raised {type(error).__name__}: {error}")
        finally:
            observer.stop()
        chosen = observer.choose()
        if chosen is not None:
            return chosen, list(observer.recorders[chosen].examples)
        tried.append(f"{step} called no module")
    raise InputInferenceError(
        f"No call of {type(module).__name__} was seen with the batches of "
        f"{type(datamodule).__name__}: {'; '.join(tried) or 'it has no validation_step'}. Give "
        "--shape or --example."
    )


def _trainer(lightning: Any, observer: Observer) -> Any:
    class Watches(lightning.Callback):  # type: ignore[misc]
        def begin(self, _: Any, __: Any, batch: Any, *___: Any) -> None:
            observer.begin_batch(batch)

        on_validation_batch_start = on_test_batch_start = on_predict_batch_start = begin

    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[Watches()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=BATCHES,
        limit_test_batches=BATCHES,
        limit_predict_batches=BATCHES,
    )


@contextmanager
def silent(framework: str) -> Iterator[None]:
    """Nobody trains here: what a trainer says of the machine and the loaders is of no interest."""
    said = logging.getLogger(f"{framework}.utilities.rank_zero")
    level = said.level
    said.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        said.setLevel(level)


def _options(verb: str) -> dict[str, Any]:
    return {"return_predictions": False} if verb == "predict" else {"verbose": False}


def is_own(module: nn.Module, step: str) -> bool:
    """Tell whether a step does something; ``predict_step`` calls ``forward`` by default."""
    found = getattr(type(module), step, None)
    home = getattr(found, "__module__", "")
    return found is not None and (step == "predict_step" or not _is_framework(home))


def _is_framework(module: str) -> bool:
    return module.startswith(("lightning.pytorch.core", "pytorch_lightning.core"))
