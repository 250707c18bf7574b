"""Find what the command line names: a module, its hyperparameters, an example of its inputs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from onnxport._archive import require_archive
from onnxport._files import MOST_BYTES
from onnxport.errors import ConfigurationError, InputInferenceError, OnnxportError
from onnxport.exporter.checkpoint_file import (
    NOT_PLAIN,
    read_plain_content,
    read_state_dict,
)
from onnxport.exporter.module_state import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

__all__ = [
    "ModuleLoader",
    "example_from",
    "hyperparameters",
    "named_object",
    "read_settings",
    "require_plain",
]

logger = logging.getLogger(__name__)

_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:[x,]\d+)*)?(?::(?P<dtype>\w+))?")
_META = "meta.pt"
_EXAMPLE_BYTES = MOST_BYTES * 16
"""What a file with an example may hold at most: 1 GiB."""


def named_object(text: str) -> Any:
    """Return what ``package.module:Name`` or ``file.py:Name`` names.

    The folder of a file, or else the current one, is where other modules are found.

    Raises:
        ConfigurationError: If it is not there, or importing it fails.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ConfigurationError(
            f"{text!r} names nothing: write package.module:Class or path/to/file.py:Class."
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _imported(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [each for each in vars(module) if inspect.isclass(getattr(module, each))]
            raise ConfigurationError(f"{place} has no {name!r}; its classes are {sorted(known)!r}.")
        found = getattr(found, part)
    return found


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigurationError(f"There is no file {file}.")
    file = file.resolve()
    _put_on_path(file.parent)
    known = sys.modules.get(file.stem)
    if known is not None and Path(str(getattr(known, "__file__", ""))).resolve() == file:
        return known
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{file} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    if known is None:
        sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if known is None:
            del sys.modules[file.stem]
        raise ConfigurationError(
            f"Importing {file} raised {type(error).__name__}: {error}"
        ) from error
    return module


def _imported(name: str) -> ModuleType:
    _put_on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigurationError(
            f"Importing {name} raised {type(error).__name__}: {error}"
        ) from error


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs; a value is JSON, or else a string.

    Raises:
        ConfigurationError: If a pair has no ``=``.

    Example:
        >>> read_settings(["hidden=64", "kind=gru", "bias=false"])
        {'hidden': 64, 'kind': 'gru', 'bias': False}
    """
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"{text!r} sets nothing: write name=value.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


class ModuleLoader:
    """Makes the module of a checkpoint, with the hyperparameters that the checkpoint holds.

    Args:
        make: A class, or a function that returns a module. What it takes by name is given from the
            hyperparameters.
        settings: Hyperparameters that count more than those of the checkpoint.
        trust: Read checkpoints as Lightning does without ``weights_only``, which runs any code that
            is in them.
    """

    def __init__(
        self, make: Callable[..., Any], settings: Mapping[str, Any], *, trust: bool = False
    ) -> None:
        if not callable(make):
            raise ConfigurationError(f"{make!r} is no class and no function.")
        self._make, self._settings, self._trust = make, dict(settings), trust

    def __call__(self, checkpoint: Path) -> nn.Module:
        """Return the module of a checkpoint, in eval mode.

        Raises:
            ConfigurationError: If it cannot be made.
            ExportError: If the checkpoint cannot be read.
        """
        return self._load(checkpoint).eval()

    def _load(self, checkpoint: Path) -> nn.Module:
        if isinstance(self._make, nn.Module):
            made: Any = self._make
        elif hasattr(self._make, "load_from_checkpoint") and not checkpoint.is_dir():
            return self._load_by_itself(checkpoint)
        else:
            made = self._call(hyperparameters(checkpoint), checkpoint)
        if not isinstance(made, nn.Module):
            raise ConfigurationError(
                f"{_name(self._make)} made no torch.nn.Module but {type(made).__name__}."
            )
        try:
            for warning in load_weights(made, read_state_dict(checkpoint)):
                logger.warning("%s: %s", checkpoint, warning)
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"The weights of {checkpoint} are none of {_name(self._make)}: {error}"
            ) from error
        return made

    def _load_by_itself(self, checkpoint: Path) -> nn.Module:
        """Let the class read its own checkpoint, hyperparameters of any kind included.

        Raises:
            ConfigurationError: If it does not.
            ExportError: If the file is none, or is damaged: trust would not help.
        """
        read_plain_content(checkpoint)
        options = {"weights_only": False} if self._trust else {}
        make: Any = self._make
        try:
            made: nn.Module = make.load_from_checkpoint(
                checkpoint, map_location="cpu", **options, **self._settings
            )
        except Exception as error:
            more = (
                " If the checkpoint holds objects of other classes and you trust who wrote it, "
                "--trust-checkpoint lets it run their code."
            )
            raise ConfigurationError(
                f"{_name(self._make)}.load_from_checkpoint({str(checkpoint)!r}) raised "
                f"{type(error).__name__}: {error}.{'' if self._trust else more} "
                "--set name=value gives a hyperparameter that the checkpoint lacks."
            ) from error
        return made

    def _call(self, saved: Mapping[str, Any], checkpoint: Path) -> Any:
        try:
            parameters = list(inspect.signature(self._make).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        wanted = {**saved, **self._settings}
        if parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters):
            names = {each.name for each in parameters}
            wanted = {name: value for name, value in wanted.items() if name in names}
        require_plain(wanted, checkpoint)
        try:
            return self._make(**wanted)
        except Exception as error:
            raise ConfigurationError(
                f"{_name(self._make)}({', '.join(wanted)}) raised {type(error).__name__}: {error}. "
                "--set name=value gives a hyperparameter that the checkpoint lacks."
            ) from error


def hyperparameters(checkpoint: Path, key: str = "hyper_parameters") -> dict[str, Any]:
    """Return the hyperparameters that a checkpoint holds.

    Args:
        checkpoint: A file; or a folder that processes have written together, where Lightning puts
            what is no weight into ``meta.pt``.
        key: Of the module's, or of the data module's.

    Raises:
        ExportError: If it cannot be read.
        ConfigurationError: If they are an object of another class as a whole.
    """
    file = checkpoint / _META if checkpoint.is_dir() else checkpoint
    found = read_plain_content(file).get(key) if file.is_file() else None
    if found is NOT_PLAIN:
        require_plain({key: found}, checkpoint)
    return dict(found) if isinstance(found, dict) else {}


def require_plain(values: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse hyperparameters whose values cannot be read: a default in their place would be wrong.

    Raises:
        ConfigurationError: With the first one.
    """
    for name, value in values.items():
        if _holds_other(value):
            raise ConfigurationError(
                f"The hyperparameter {name!r} in {checkpoint} is, or holds, an object that is no "
                "plain value. Give it with --set name=value, or give --module a function that "
                "makes the module."
            )


def _holds_other(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_other, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_other, value))
    return value is NOT_PLAIN


def example_from(
    module: nn.Module,
    *,
    file: Path | None = None,
    shapes: Sequence[str] = (),
) -> Any:
    """Return an example of a module's inputs.

    Args:
        module: The module.
        file: ``.pt`` (a tensor, a tuple or a mapping; nothing in it is executed), ``.npy``, or
            ``.npz`` (keyword arguments).
        shapes: ``[name=]8x3x32x32[:float32]`` for each input; the values are random.

    Raises:
        ConfigurationError: If a file or shape is none.
        InputInferenceError: If nothing is given and the module has no ``example_input_array``.
    """
    if file is not None:
        return _from_data(file)
    if shapes:
        return _from_shapes(shapes)
    own = getattr(module, "example_input_array", None)
    if own is not None:
        return own
    raise InputInferenceError(
        f"Nothing says what {type(module).__name__}.forward takes. Give --shape 8x3x32x32 for each "
        "input ([name=]sizes[:dtype]), --example FILE (.pt, .npy, .npz), or --datamodule "
        "package.module:Class."
    )


def _from_data(file: Path) -> Any:
    if not file.is_file():
        raise ConfigurationError(f"There is no file {file}.")
    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        require_archive(file, _EXAMPLE_BYTES)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OnnxportError:
        raise
    except Exception as error:  # a damaged file raises anything
        raise ConfigurationError(
            f"{file} holds no example: {type(error).__name__}: {error}. It may be .npy, .npz, or "
            "what torch.save wrote of a tensor, a tuple or a mapping of tensors."
        ) from error


def _from_shapes(shapes: Sequence[str]) -> Any:
    """Make random tensors; whole numbers are 0 and 1, which any table of embeddings has.

    Raises:
        ConfigurationError: If one is no shape, or only some have names.
    """
    named: dict[str, torch.Tensor] = {}
    positional: list[torch.Tensor] = []
    for text in shapes:
        found = _SPEC.fullmatch(text)
        dtype = None if found is None else getattr(torch, found["dtype"] or "float32", None)
        if found is None or not isinstance(dtype, torch.dtype):
            raise ConfigurationError(
                f"{text!r} is no shape: write [name=]8x3x32x32[:dtype], for instance "
                "ids=4x16:int64."
            )
        sizes = [int(size) for size in re.findall(r"\d+", found["sizes"] or "")]
        tensor = torch.randn(sizes) if dtype.is_floating_point else torch.randint(0, 2, sizes)
        if found["name"]:
            named[found["name"]] = tensor.to(dtype)
        else:
            positional.append(tensor.to(dtype))
    if named and positional:
        raise ConfigurationError("Give each --shape a name, or none of them.")
    return named or tuple(positional)


def _name(make: Any) -> str:
    return str(getattr(make, "__qualname__", type(make).__qualname__))
