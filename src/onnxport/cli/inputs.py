"""What the options of several commands say: a module, what it takes, a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from onnxport.cli.load import ModuleLoader
    from onnxport.exporter.model_facts import ModelFacts

__all__ = ["Inputs", "facts_at"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the options of a command say about a module and what it takes."""

    module: str
    shapes: Sequence[str] | None
    example: Path | None
    datamodule: str
    settings: Sequence[str] | None
    trust: bool = field(kw_only=True)

    def read(self, checkpoints: Sequence[Path]) -> tuple[Callable[[Path], nn.Module], Any, str]:
        """Return what loads modules, an example, and of which submodule it is a call.

        Args:
            checkpoints: The first one that can be loaded gives the module that is watched.

        Raises:
            OnnxportError: Of the first one, if none can be loaded.
        """
        from onnxport.cli.load import example_from, named_object

        load = self.loader()
        first, checkpoint = _first(load, checkpoints)
        if self.datamodule and not (self.example or self.shapes):
            from onnxport.callbacks.lightning.examples import observed_calls

            data = _made(named_object(self.datamodule), checkpoint)
            chosen, calls = observed_calls(first, data)
            return load, calls, chosen
        return load, example_from(first, file=self.example, shapes=self.shapes or ()), ""

    def loader(self) -> ModuleLoader:
        """Return what loads modules.

        Raises:
            ConfigurationError: If there is no such module.
        """
        from onnxport.cli.load import ModuleLoader, named_object, read_settings
        from onnxport.errors import ConfigurationError

        if not self.module:
            raise ConfigurationError(
                "Nothing says what the weights are of: --module package.module:Class or "
                "--module file.py:Class."
            )
        if self.trust:
            sys.stderr.write("--trust-checkpoint: a checkpoint can run any code on this machine.\n")
        settings = read_settings(self.settings or ())
        return ModuleLoader(named_object(self.module), settings, trust=self.trust)


def _first(load: ModuleLoader, checkpoints: Sequence[Path]) -> tuple[nn.Module, Path]:
    """Return the module of the first checkpoint that has one; others may be damaged.

    Raises:
        OnnxportError: Of the first one, if none has.
    """
    from onnxport.errors import OnnxportError

    failed: list[OnnxportError] = []
    for checkpoint in checkpoints:
        try:
            return load(checkpoint), checkpoint
        except OnnxportError as error:
            failed.append(error)
    raise failed[0]


def _made(make: Any, checkpoint: Path) -> Any:
    """Make a data module, with the hyperparameters that the checkpoint holds of it.

    Raises:
        ConfigurationError: If it cannot be made.
    """
    from onnxport.cli.load import hyperparameters, require_plain
    from onnxport.errors import ConfigurationError

    given = hyperparameters(checkpoint, "datamodule_hyper_parameters")
    require_plain(given, checkpoint)
    try:
        return make(**given) if callable(make) else make
    except Exception as error:
        raise ConfigurationError(
            f"The data module raised {type(error).__name__} when it was made: {error}"
        ) from error


def facts_at(path: Path) -> ModelFacts:
    """Look at a model.

    Raises:
        ConfigurationError: If it is not there.
    """
    from onnxport.errors import ConfigurationError
    from onnxport.exporter.model_facts import facts_of

    if not path.is_file():
        raise ConfigurationError(f"There is no model at {path}. Give the path of an .onnx file.")
    return facts_of(path)
