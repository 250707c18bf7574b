"""Leave a folder that repeats a failed export: inputs, module, script, versions and logs."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import pickle  # nosec - what torch.save uses
import platform
import shutil
import string
import sys
import sysconfig
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch
from typing_extensions import override

from onnxport.errors import VerificationError
from onnxport.exporter.reproduce_script import BUILD_HERE, SCRIPT
from onnxport.tree import Constant, Leaf, Node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxport.exporter.base import ExportRequest
    from onnxport.tree import Spec

__all__ = [
    "MAX_MODULE_BYTES",
    "FailedAttempt",
    "loads_module",
    "reproduction_path",
    "write_reproduction",
]

logger = logging.getLogger(__name__)

MAX_MODULE_BYTES = 256 * 2**20
"""Larger modules are not saved: the script has a line for the user to build them."""

_MOST_OF_CODE = 16 * 2**20
"""What a module's file may hold more than its tensors."""

SUFFIX = ".failed"
INPUTS, MODULE, SCRIPT_NAME, VERSIONS = "inputs.npz", "module.pt", "reproduce.py", "versions.txt"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy", "onnxport")
_ALSO = ("lightning", "pytorch-lightning", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedAttempt:
    """One try of one core that failed.

    Args:
        core: ``"dynamo"``, ``"trace"`` or ``"script"``.
        variant: How the core was asked, in words, or ``""``.
        error: What was raised.
        output: What torch printed during the attempt, from Python and from C++.
        reason: Why it failed, in words.
    """

    core: str
    variant: str = ""
    error: BaseException
    output: str = ""
    reason: str = ""


def reproduction_path(model: Path) -> Path:
    """Return the folder for a model that did not come out: ``epoch=3.onnx.failed``."""
    return model.with_name(model.name + SUFFIX)


def loads_module(folder: Path) -> bool:
    """Tell whether what was written repeats the failure as it is; else the module is not in it."""
    return (folder / MODULE).is_file()


def write_reproduction(
    folder: Path,
    request: ExportRequest,
    attempts: Sequence[FailedAttempt],
    *,
    max_module_bytes: int = MAX_MODULE_BYTES,
) -> Path | None:
    """Write the folder in one step; an older one is replaced.

    Args:
        folder: Where; see :func:`reproduction_path`.
        request: What was to be exported.
        attempts: What failed, in order.
        max_module_bytes: The module is not saved if its tensors are larger.

    Returns:
        The folder, or ``None`` if it could not be written, which is logged and not raised: the
        failed export is what the user has to hear of.
    """
    staged: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".onnxport-", dir=folder.parent))
        _fill(staged, request, attempts, max_module_bytes)
        staged.chmod(0o755)  # mkdtemp makes it private, and a model's folder is not
        _replace(folder, staged)
    except Exception as error:  # noqa: BLE001 - the user's tensors and modules can raise anything
        logger.warning("No reproduction was written to %s: %s", folder, error)
        return None
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def _fill(
    folder: Path, request: ExportRequest, attempts: Sequence[FailedAttempt], limit: int
) -> None:
    np.savez(folder / INPUTS, *(_array(tensor) for tensor in request.args))
    call = _call(request.module.spec)
    # A call with objects that have no literal needs our own wrapper, which holds them.
    saved = request.module if call is None else request.module.module
    trouble = _save_module(saved, folder / MODULE, limit)
    script = _script(request, attempts, call, trouble)
    (folder / SCRIPT_NAME).write_text(script, encoding="utf-8")
    (folder / VERSIONS).write_text(_versions(), encoding="utf-8")
    for number, attempt in enumerate(attempts, 1):
        log = folder / f"{number:02d}-{attempt.core}.log"
        log.write_text(_log(attempt), encoding="utf-8", errors="backslashreplace")


def _replace(folder: Path, staged: Path) -> None:
    """Bring a finished folder under its name.

    Raises:
        FileExistsError: If something that we did not write has this name.
        OSError: If the disk does not take it; the older folder is put back.
    """
    if os.path.lexists(folder):
        if not (folder / SCRIPT_NAME).is_file() or not (folder / VERSIONS).is_file():
            raise FileExistsError("a file or folder of this name is not a reproduction")
        old = staged.with_name(f"{staged.name}-old")
        folder.rename(old)
        try:
            staged.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        staged.rename(folder)


# --- inputs and module --------------------------------------------------------------------------


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return an array; bytes where NumPy does not know the dtype (bfloat16, float8)."""
    plain = tensor.detach().cpu().contiguous()
    try:
        return plain.numpy()
    except TypeError:
        return plain.reshape(-1).view(torch.uint8).numpy()


def _save_module(module: torch.nn.Module, path: Path, limit: int) -> str:
    """Save a module.

    Returns:
        Why it could not be saved, or ``""``.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > limit:
        return f"it has {size} bytes, more than {limit}"
    of_script = _is_of_script(module)
    try:
        if of_script:
            _Measuring(_MOST_OF_CODE).dump(module)
        torch.save(module, path, pickle_module=cloudpickle if of_script else pickle)
    except _TooMuchDataError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - pickling runs user code
        path.unlink(missing_ok=True)
        return f"it cannot be pickled ({type(error).__name__})"
    return ""


class _TooMuchDataError(Exception):
    """Raised where the code of a script names data that would be saved with it."""


class _Measuring(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles to nowhere, and raises as soon as that is too much; a module's tensors do not count.

    Args:
        limit: In bytes.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(self, protocol=5, buffer_callback=self._add_buffer)
        self._limit, self._left = limit, limit
        self._own: set[int] = set()

    @override
    def dump(self, module: torch.nn.Module) -> None:
        """Measure.

        Raises:
            _TooMuchDataError: If it is too much.
        """
        self._own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        super().dump(module)

    def persistent_id(self, value: object) -> str | None:
        """Count a tensor and leave it out."""
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._own:
            self._add(value.numel() * value.element_size())
        return "tensor"

    def write(self, data: bytes) -> int:
        """Take the place of a file."""
        self._add(len(data))
        return len(data)

    def _add_buffer(self, buffer: pickle.PickleBuffer) -> None:
        self._add(buffer.raw().nbytes)

    def _add(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _TooMuchDataError(f"its code holds more than {self._limit} bytes of data")


def _is_of_script(module: torch.nn.Module) -> bool:
    """Tell whether a class is in the script that was run: its code is saved, not only its name."""
    return any(type(submodule).__module__ == "__main__" for submodule in module.modules())


# --- the script ---------------------------------------------------------------------------------


def _script(
    request: ExportRequest, attempts: Sequence[FailedAttempt], call: str | None, trouble: str
) -> str:
    inputs = [
        f"    ({name!r}, {tensor.dtype}, {tuple(tensor.shape)}, {axes!r}),"
        for name, tensor, axes in zip(
            request.input_names, request.args, request.input_axes, strict=True
        )
    ]
    # A request may leave the outputs to torch's own names.
    outputs = [
        f"    ({name!r}, {axes!r}),"
        for name, axes in zip(request.output_names, request.output_axes, strict=True)
    ]
    needs_us = call is None and not trouble
    more = ", and onnxport: an argument of the call has no plain form" if needs_us else ""
    if not trouble and _is_of_script(request.module.module):
        more += "; cloudpickle, too: the code of the module is in its file"
    return string.Template(SCRIPT).substitute(
        title=type(request.module.module).__name__,
        needs=more,
        paths=repr(list(dict.fromkeys(_code_folders(request.module.module)))),
        inputs="\n".join(inputs),
        outputs="\n".join(outputs),
        opset=request.opset,
        plain=not needs_us,
        steps="\n".join(map(_step, attempts)),
        load=_load(trouble),
        call=_forward(call, built_by_user=bool(trouble)),
    )


def _load(trouble: str) -> str:
    if not trouble:
        return (
            "# This runs code that is in the file: do it only if you know who has made it.\n"
            f'    return torch.load(HERE / "{MODULE}", weights_only=False)'
        )
    return (
        f"# The module was not saved: {trouble}.\n"
        f'    raise NotImplementedError("build the module in load_module()")  # {BUILD_HERE}'
    )


def _forward(call: str | None, *, built_by_user: bool) -> str:
    if call is not None:
        return f"return tuple(tensors_of(self.module({call})))"
    if built_by_user:
        return "return tuple(tensors_of(self.module(*tensors)))  # <<< WRITE THE CALL HERE"
    return "return self.module(*tensors)"


def _step(attempt: FailedAttempt) -> str:
    proof: tuple[dict[str, int], str] | None = None
    if isinstance(attempt.error, VerificationError):
        checks = attempt.error.checks
        wrong = next((check for check in reversed(checks) if not check.ok), None)
        proof = (dict(wrong.sizes), wrong.rows) if wrong is not None else ({}, "real")
    return f"    ({attempt.core!r}, {attempt.variant!r}, {proof!r}),"


def _call(spec: Spec) -> str | None:
    """Write the arguments of the observed call as source; ``None`` if one has no literal."""
    places = iter(range(sys.maxsize))
    if not isinstance(spec, Node) or len(spec.children) != 2:  # noqa: PLR2004 - (args, kwargs)
        return None
    parts = [_literal(child, places) for child in spec.children]
    return None if None in parts else f"*{parts[0]}, **{parts[1]}"


def _literal(spec: Spec, places: Iterator[int]) -> str | None:
    if isinstance(spec, Leaf):
        return f"tensors[{next(places)}]"
    if isinstance(spec, Constant):
        return _constant(spec.value)
    keys = [_constant(key) for key in spec.keys]
    children = [_literal(child, places) for child in spec.children]
    if spec.kind not in {tuple, list, dict} or None in keys or None in children:
        return None
    if spec.kind is dict:
        pairs = zip(keys, children, strict=True)
        return f"{{{', '.join(f'{key}: {child}' for key, child in pairs)}}}"
    items = "".join(f"{child}, " for child in children).rstrip()
    return f"({items})" if spec.kind is tuple else f"[{items}]"


def _constant(value: Any) -> str | None:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.{value!r}"
    if type(value) is float and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value) if value is None or type(value) in {bool, int, float, str, bytes} else None


def _code_folders(module: torch.nn.Module) -> Iterator[str]:
    """Yield the folders from which the module's own code can be imported."""
    installed = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    for submodule in module.modules():
        source = sys.modules.get(type(submodule).__module__)
        file = getattr(source, "__file__", None)
        if source is None or file is None or file.startswith(installed):
            continue
        if not hasattr(source, type(submodule).__qualname__.partition(".")[0]):
            continue  # of the trainer's ``__main__``, which is not the one of this process
        depth = source.__name__.count(".") + (Path(file).name == "__init__.py")
        parents = Path(file).resolve().parents
        if depth < len(parents):
            yield str(parents[depth])


# --- texts --------------------------------------------------------------------------------------


def _versions() -> str:
    lines = [f"python {platform.python_version()}", f"platform {platform.platform()}"]
    for package in (*_PACKAGES, *_ALSO):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            if package in _PACKAGES:
                lines.append(f"{package} is not installed")
    return "\n".join(lines) + "\n"


def _log(attempt: FailedAttempt) -> str:
    how = f" ({attempt.variant})" if attempt.variant else ""
    raised = "".join(traceback.format_exception(attempt.error))
    printed = attempt.output or "(nothing)"
    return (
        f"{attempt.core}{how}\n{attempt.reason}\n\n=== raised\n{raised}\n"
        f"=== printed by torch during the attempt\n{printed}\n"
    )
