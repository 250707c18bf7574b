"""Write a graph to disk and bring it under its final name in one step."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from filelock import FileLock, Timeout

from onnxport._files import DATA_SUFFIX
from onnxport._files import sync as sync_file
from onnxport.config import VARIANTS
from onnxport.errors import PublishError
from onnxport.exporter.flat import PREFIX
from onnxport.exporter.model_file import write_all, write_external, write_inline
from onnxport.exporter.ownership import (
    METADATA_PREFIX,
    cannot_be_read,
    is_our_report,
    is_ours,
    read_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from onnxport.exporter.template import Template
    from onnxport.signature import ModelSignature, TensorSpec

__all__ = [
    "EXTERNAL_DATA_BYTES",
    "STAGING",
    "drop_weights",
    "finish_graph",
    "model_files",
    "publish",
    "remove_model",
    "report_path",
    "require_replaceable",
    "staging",
    "sweep",
    "sync_model",
    "variant_files",
    "variant_path",
    "withdraw_model",
    "withdraw_staged",
    "write_filled",
    "write_text",
    "write_whole",
]

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights beyond this go to ``<stem>.onnx.data``; a protobuf file cannot pass 2 GB."""

REPORT_SUFFIX = ".json"


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """Give the path of a temporary file that can be published as ``final``.

    It lies in a hidden folder beside the final name, so that publishing is a rename; the folder is
    removed on any exit. What a process that was killed has left is removed by the next one.

    Raises:
        PublishError: If the folder cannot be made.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent)
        folder, lock = _locked_folder(final.parent)
    except OSError as error:
        in_the_way = any(os.path.isfile(folder) for folder in final.parents)  # noqa: PTH113 - raises nothing
        why = "a file is where the folder would be" if in_the_way else error.strerror or error
        raise PublishError(
            f"Cannot write to {final.parent}: {why}. Give a writable folder with dirpath=."
        ) from error
    try:
        yield folder / final.name
    finally:
        _clear(folder, lock)


STAGING = ".onnxport-"
"""What names begin with of folders in which a file is made, and of files that were withdrawn."""
_LOCK = "lock"
_TRIES = 5


def sweep(folder: Path) -> None:
    """Remove the staging folders of processes that are no more, and what was withdrawn."""
    for left in folder.glob(f"{STAGING}*"):
        if not left.is_dir():
            with suppress(OSError):
                left.unlink()
            continue
        try:
            lock = _lock(left)
        except Timeout:  # somebody works in it
            continue
        if lock is not None:
            _clear(_taken_away(left), lock)


def _taken_away(folder: Path) -> Path:
    """Give a folder another name: who has made it, and comes too late to lock it, sees that."""
    try:
        return folder.rename(_fresh_name(folder.parent))
    except OSError:
        return folder


def _clear(folder: Path, lock: FileLock | None) -> None:
    """Remove a folder and what is in it, the lock last: it is held until the rest is gone.

    On a network file system a file that is removed while it is open stays, by another name, and
    with it its folder.
    """
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name == _LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if lock is not None:
        lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(parent: Path) -> tuple[Path, FileLock | None]:
    """Make a staging folder that nobody sweeps.

    Raises:
        OSError: If it cannot be made.
        FileNotFoundError: If somebody else removes all that is made.
    """
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=parent))
        try:
            lock = _lock(folder)
        except Timeout:  # somebody is about to sweep it
            continue
        if folder.exists():  # nobody has swept it before it was locked
            return folder, lock
        if lock is not None:
            lock.release()
    raise FileNotFoundError(errno.ENOENT, "somebody removes the folders that are made", parent)


def _lock(folder: Path) -> FileLock | None:
    """Lock a staging folder; the system unlocks it when the process ends, however it ends.

    Returns:
        The lock; ``None``: folders cannot be locked here, or this one is gone.

    Raises:
        Timeout: If somebody else has locked it.
    """
    lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:  # which is an OSError
        raise
    except (OSError, NotImplementedError):
        return None
    return lock


def finish_graph(
    model: ir.Model, signature: ModelSignature, weights: Mapping[str, str]
) -> dict[ir.Value, str]:
    """Give a graph names as in the checkpoint and complete shapes.

    Args:
        model: The graph; changed in place.
        signature: Shapes of inputs and outputs; fills in dims that the exporter left open. Dims
            that it fixed stay, so that a wrongly fixed one is found.
        weights: Names of the weights in the graph -> names in the checkpoint.

    Returns:
        The initializers that are weights -> their names in the checkpoint.
    """
    known = {
        value: weights[name] for name, value in model.graph.initializers.items() if name in weights
    }
    _rename_initializers(model, weights)
    _complete_shapes(model.graph.inputs, signature.inputs)
    _complete_shapes(model.graph.outputs, signature.outputs)
    from onnxport import __version__

    model.producer_name, model.producer_version = "onnxport", __version__
    return known


def drop_weights(model: ir.Model) -> None:
    """Let go of a graph's weights: onnxscript's rewriter keeps the last graph that it saw."""
    for value in model.graph.initializers.values():
        value.const_value = None


def write_whole(model: ir.Model, path: Path, metadata: Mapping[str, object]) -> None:
    """Write a graph with the weights that are in it.

    Args:
        model: The graph; changed in place.
        path: Where to write; external data go to ``<path>.data``.
        metadata: Written to ``metadata_props`` under ``onnxport.<key>``; values that are no strings
            as JSON.

    Raises:
        PublishError: If the disk does not take it.
    """
    model.metadata_props.update(_props(metadata))
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    external = path.name + DATA_SUFFIX if size > EXTERNAL_DATA_BYTES else None
    with _written(path):
        ir.save(model, path, external_data=external)


def write_filled(
    template: Template,
    path: Path,
    tensors: Iterable[torch.Tensor],
    metadata: Callable[[], Mapping[str, object]],
    *,
    sync: bool = True,
) -> None:
    """Write a template with weights; no more than one tensor is held in memory.

    Args:
        template: The template.
        path: Where to write; external data go to ``<path>.data``.
        tensors: One for each slot, in order.
        metadata: Gives what is written to ``metadata_props``, see :func:`write_whole`. It is asked
            when the weights are written, so that it may be worked out meanwhile.
        sync: Bring the file to the disk; if not, :func:`sync_model` has to.

    Raises:
        PublishError: If the disk does not take it.
    """
    data = path.with_name(path.name + DATA_SUFFIX)
    parts = (template.head, template.graph, template.slots)
    with _written(path, sync=sync), path.open("wb", buffering=0) as file:
        if template.nbytes > EXTERNAL_DATA_BYTES:
            with data.open("wb", buffering=0) as weights:
                write_external(file, weights, data.name, *parts, tensors)
        else:
            write_inline(file, *parts, tensors)
        # A protobuf message may have its fields in any order, and be written field by field.
        props = onnx.ModelProto()
        onnx.helper.set_model_props(props, _props(metadata()))
        write_all(file, props.SerializeToString())


@contextmanager
def _written(path: Path, *, sync: bool = True) -> Iterator[None]:
    """Start afresh, and bring what was written to the disk.

    Raises:
        PublishError: If the disk does not take it.
    """
    try:
        path.with_name(path.name + DATA_SUFFIX).unlink(missing_ok=True)
        yield
        for file in model_files(path) if sync else ():
            sync_file(file)
    except OSError as error:
        raise PublishError(_not_written(path, error)) from error


def sync_model(path: Path) -> None:
    """Bring a model's files to the disk.

    Raises:
        PublishError: If the disk does not take it.
    """
    try:
        for file in model_files(path):
            sync_file(file)
    except OSError as error:
        raise PublishError(_not_written(path, error)) from error


def _props(metadata: Mapping[str, object]) -> dict[str, str]:
    return {
        METADATA_PREFIX + key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }


def _rename_initializers(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give weights the names that they have in the checkpoint."""
    used = {value.name for value in _values(model.graph)}
    for name in list(model.graph.initializers):
        renamed = names.get(name, name.removeprefix(PREFIX))
        if renamed not in used:
            value = model.graph.initializers[name]
            value.name = renamed
            if value.const_value is not None:
                value.const_value.name = renamed
            used.add(renamed)


def _complete_shapes(values: Iterable[ir.Value], specs: Iterable[TensorSpec]) -> None:
    shapes = {spec.name: spec.shape for spec in specs}
    for value in values:
        wanted = shapes.get(value.name or "")
        if wanted is None:
            continue
        known = wanted if value.shape is None else value.shape
        if len(known) == len(wanted):
            pairs = zip(known, wanted, strict=True)
            value.shape = ir.Shape(have if isinstance(have, int) else want for have, want in pairs)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def publish(staged: Path, final: Path) -> None:
    """Bring a proven model under its final name, data first.

    Raises:
        PublishError: If the rename fails, or the disk does not say that it holds it, or a file of
            somebody else has that name; nothing of ours has the final name then.
    """
    require_replaceable(final)
    _drop_variants(final)
    staged_data, final_data = (path.with_name(path.name + DATA_SUFFIX) for path in (staged, final))
    try:
        with ExitStack() as undo:
            has_data = staged_data.exists()
            if has_data:
                staged_data.replace(final_data)
                undo.callback(final_data.unlink, missing_ok=True)
            staged.replace(final)
            undo.callback(final.unlink, missing_ok=True)
            if not has_data:
                final_data.unlink(missing_ok=True)
            sync_file(final.parent)
            undo.pop_all()
    except OSError as error:
        raise PublishError(_not_written(final, error)) from error


def _drop_variants(final: Path) -> None:
    """Remove the children of an older model: they would be of other weights than the new one.

    Raises:
        PublishError: If the disk does not let them go.
    """
    try:
        for file in variant_files(final):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise PublishError(_not_written(final, error)) from error


def require_replaceable(final: Path) -> None:
    """Refuse to overwrite files that we did not write.

    Raises:
        PublishError: If there is one under the name of the model or of its report.
    """
    report = report_path(final)
    for file, ours in ((final, is_ours), (report, is_our_report)):
        if file.is_file() and not ours(file):
            whose = "was not written by onnxport"
            if cannot_be_read(file):
                whose = "cannot be read, so nobody knows whose it is,"
            raise PublishError(
                f"{file} {whose} and is left alone. "
                "Move it away, or give another folder for the models with dirpath=."
            )


def write_text(path: Path, text: str, check: Callable[[], None] = lambda: None) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it.

    Args:
        path: The file.
        text: What it will hold.
        check: Called once the file is staged, see :func:`withdraw_staged`; may raise.

    Raises:
        PublishError: If the disk does not take it.
    """
    with staging(path) as staged:
        try:
            staged.touch()
            check()
            staged.write_text(text, encoding="utf-8")
            sync_file(staged)
            staged.replace(path)
        except OSError as error:
            raise PublishError(_not_written(path, error)) from error


def model_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a model that exist: the graph and its external data."""
    files = (path, path.with_name(path.name + DATA_SUFFIX))
    return tuple(file for file in files if file.exists())


def variant_path(path: Path, name: str) -> Path:
    """Return where a variant of a model lies.

    Example:
        >>> variant_path(Path("epoch=1.onnx"), "fp16").name
        'epoch=1.fp16.onnx'
    """
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def variant_files(path: Path) -> list[Path]:
    """Return the files of a model's variants; a model of that name is another checkpoint's."""
    places = {name: variant_path(path, name) for name in VARIANTS}
    return [
        file
        for name, place in places.items()
        if place.exists() and read_metadata(place).get("variant") == name
        for file in model_files(place)
    ]


def report_path(path: Path) -> Path:
    """Return where the report of a model lies."""
    return path.with_name(path.name + REPORT_SUFFIX)


def remove_model(path: Path, *, known: bool = False) -> None:
    """Remove a model of ours, its external data and its report.

    What is not there, and what somebody else put there, is left alone.

    Args:
        path: The model.
        known: It is ours, also if it cannot be read.

    Raises:
        OSError: If the disk does not take it.
    """
    for file in _files_of_ours(path, known=known):
        file.unlink(missing_ok=True)


def withdraw_model(path: Path, *, known: bool = False) -> None:
    """Take the names from a model of ours, its external data and its report; see `remove_model`.

    It takes no longer for a large model, because training waits for it: what has lost its name is
    swept later.

    Args:
        path: The model.
        known: It is ours, also if it cannot be read.

    Raises:
        OSError: If the disk does not take it.
    """
    for file in _files_of_ours(path, known=known):
        try:
            # Into no folder, which somebody could sweep before they are in it.
            file.rename(_fresh_name(path.parent))
        except FileNotFoundError:  # removed a moment ago
            continue
        except OSError:  # the disk may take the other operation
            file.unlink(missing_ok=True)


def withdraw_staged(path: Path) -> None:
    """Make sure that no model that is being made now gets this name, nor its report.

    Raises:
        OSError: If the disk does not take it.
    """
    names = (path.name, report_path(path).name)
    with suppress(FileNotFoundError):  # there is no such folder yet
        with os.scandir(path.parent) as entries:  # of which there may be thousands
            staged = [Path(entry) for entry in entries if entry.name.startswith(STAGING)]
        for folder in staged:
            if any((folder / name).exists() for name in names):
                with suppress(FileNotFoundError):  # published, or given up, a moment ago
                    folder.rename(_fresh_name(path.parent))


def _files_of_ours(path: Path, *, known: bool = False) -> list[Path]:
    """Return the files of a model that are ours; first the report, which says that there is one."""
    report = report_path(path)
    variants = variant_files(path)
    if known:
        return [report, *variants, *model_files(path)]
    reported = is_our_report(report)
    # A disk may fail once: what says nothing of itself is asked again.
    ours = is_ours(path) or is_ours(path) or (reported and not path.exists())
    return [*([report] if reported else []), *variants, *(model_files(path) if ours else ())]


def _fresh_name(folder: Path) -> Path:
    return folder / f"{STAGING}{secrets.token_hex(8)}"


def _not_written(path: Path, error: OSError) -> str:
    return (
        f"Cannot write {path}: {error.strerror or error}. Nothing half-written is left there; "
        "free some space or give another folder with dirpath=."
    )
