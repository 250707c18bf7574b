"""One export of one case, and an independent judgement of the model that comes out.

Nothing here uses onnxport's own proof: sizes, values, reference and comparison are this file's.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import random
import re
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import torch
from torch.utils import _pytree as pytree

import onnxport

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from zoo.base import Case

    from onnxport import Example

__all__ = ["RAW", "check_eager", "latency", "run_mode"]

TOLERANCE = 1e-3
"""Of ``|d| / (1 + |reference|)``, elementwise."""
NOISE = 10.0
"""How many times eager float32's own distance from float64 a model may be away."""
RAW = ("raw_dynamo", "raw_torchscript")
LATENCY_S = 1.5
"""For the timing of one case, warm-up not counted."""

Stage = Callable[[str], None]
Row = dict[str, Any]


# The module and its calls.


def seeded_module(case: Case) -> nn.Module:
    # Layers of other packages draw from all three when they are made.
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what they draw from
    return case.build().eval()


def seeded_call(case: Case, sizes: Mapping[str, int], seed: int) -> Example:
    torch.manual_seed(seed)
    return case.call(**sizes)


def tensors(tree: Any, numbers: bool = False) -> list[Any]:
    """Flatten anything that a module takes or returns, by a walker of our own."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (bool, int, float)):
        return [torch.tensor(tree)] if numbers else []
    children = _children(tree)
    return [leaf for child in children for leaf in tensors(child, numbers)]


def _children(tree: Any) -> list[Any]:  # noqa: PLR0911 - one per kind of container
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, torch.Size):
        return []
    if isinstance(tree, (tuple, list)):
        return list(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name, None) for field in dataclasses.fields(tree)]
    if hasattr(tree, "layers") and hasattr(tree, "get_seq_length"):  # transformers' caches
        return [item for layer in tree.layers for item in (layer.keys, layer.values)]
    if hasattr(tree, "self_attention_cache"):
        return [tree.self_attention_cache, tree.cross_attention_cache]
    if callable(getattr(tree, "to_dict", None)) and hasattr(tree, "edge_index"):  # graphs
        return list(tree.to_dict().values())
    return []


def axes(case: Case) -> list[dict[int, str]]:
    """Give, per flat input tensor, the axes that vary: ``Case.axes`` by our own walker."""
    base = dict(case.observed[0])
    flat = tensors(inputs_of(seeded_call(case, base, 0)))
    found: list[dict[int, str]] = [{} for _ in flat]
    for dim, size in base.items():
        other = next((s[dim] for s in (*case.fresh, *case.observed) if s[dim] != size), size)
        after = tensors(inputs_of(seeded_call(case, base | {dim: other}, 0)))
        for index, (one, two) in enumerate(zip(flat, after, strict=True)):
            for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)):
                if a != b:
                    found[index].setdefault(axis, dim)
    return found


def inputs_of(example: Example) -> tuple[Any, dict[str, Any]]:
    return tuple(example.args), dict(example.kwargs)


# The three exports.


def run_mode(case: Case, mode: str, folder: Path, stage: Stage) -> Row:
    """Export one case in one way and judge the model.

    Returns:
        What goes into the row: outcome, reason, seconds and more.
    """
    stage("build")
    module = seeded_module(case)
    path = folder / f"{mode}.onnx"
    stage("export")
    started = time.perf_counter()
    try:
        row = _EXPORTS[mode](case, module, path)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome of this case
        row = {"outcome": "failed", "reason": first_line(error), "export_s": _since(started)}
        report = getattr(error, "report", None)
        return row | (_of_report(report) if report is not None else {})
    stage("check")
    return row | judge(case, path, row.get("names"))


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)


def first_line(error: BaseException) -> str:
    """Give the line of an error that says most; torch.onnx puts its steps before the cause."""
    cause = error
    while cause.__cause__ is not None and "Failed to" in str(cause):
        cause = cause.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(cause))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:400]


def _example(case: Case) -> Example:
    return seeded_call(case, case.observed[0], 1)


def _bound(module: nn.Module, example: Example) -> dict[str, Any]:
    """Give arguments by parameter name, as ``torch.export`` names them."""
    signature = inspect.signature(module.forward)
    return dict(signature.bind(*example.args, **dict(example.kwargs)).arguments)


def _positional(example: Example) -> tuple[Any, ...]:
    """Give the positional arguments as ``torch.onnx.export`` wants them.

    A dict as the last of them is taken for keyword arguments, unless another dict follows.
    """
    return tuple(example.args) if example.kwargs else (*example.args, {})


def _raw_dynamo(case: Case, module: nn.Module, path: Path) -> Row:
    example = _example(case)
    queue = iter(axes(case))
    arguments = _bound(module, example)
    # Axes are in the order of (args, kwargs); keyword arguments may be given in another order.
    shapes_by_id = {id(t): next(queue) for t in tensors(inputs_of(example))}
    shapes = {name: _dynamic(value, shapes_by_id) for name, value in arguments.items()}
    wanted = any(shapes_by_id.values())
    started = time.perf_counter()
    program = torch.onnx.export(
        module,
        _positional(example),
        kwargs=dict(example.kwargs) or None,
        dynamo=True,
        dynamic_shapes=shapes if wanted else None,
        verbose=False,
    )
    seconds = _since(started)
    program.save(str(path))
    names = [name for name, _ in _placeholder_names(module, example)]
    return {"export_s": seconds, "names": names}


def _dynamic(tree: Any, shapes: dict[int, dict[int, str]]) -> Any:
    if isinstance(tree, torch.Tensor):
        return dict(shapes.get(id(tree)) or {}) or None
    if isinstance(tree, Mapping):
        return {key: _dynamic(value, shapes) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_dynamic(value, shapes) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_dynamic(value, shapes) for value in tree)
    return None


def _placeholder_names(module: nn.Module, example: Example) -> list[tuple[str, torch.Tensor]]:
    """Name each tensor leaf in the order of (args, kwargs), as ``torch.export`` would."""
    by_id = {}
    leaves, _ = pytree.tree_flatten_with_path(_bound(module, example))
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            by_id[id(leaf)] = re.sub(r"[^a-zA-Z0-9]+", "_", "_".join(parts)).lower()
    return [(by_id.get(id(t), "?"), t) for t in tensors(inputs_of(example))]


def _raw_torchscript(case: Case, module: nn.Module, path: Path) -> Row:
    example = _example(case)
    queue = axes(case)
    by_id = {id(t): i for i, t in enumerate(tensors(inputs_of(example)))}
    order = [by_id[id(t)] for t in tensors(_bound(module, example)) if id(t) in by_id]
    names = [f"in{index}" for index in order]
    dynamic = {f"in{index}": queue[index] for index in order if queue[index]}
    started = time.perf_counter()
    torch.onnx.export(
        module,
        _positional(example),
        str(path),
        kwargs=dict(example.kwargs) or None,
        dynamo=False,
        input_names=names,
        dynamic_axes=dynamic or None,
        verbose=False,
    )
    return {"export_s": _since(started), "names": [f"in{i}" for i in range(len(queue))]}


def _onnxport(case: Case, module: nn.Module, path: Path) -> Row:
    calls = [seeded_call(case, sizes, 1 + i) for i, sizes in enumerate(case.observed)]
    started = time.perf_counter()
    report = onnxport.export(module, calls, path)
    seconds = _since(started)
    return {"export_s": seconds, "names": [spec.name for spec in report.inputs]} | _of_report(
        report
    )


def _of_report(report: Any) -> Row:
    won = next((a for a in report.attempts if a.ok), None)
    return {
        "stages_s": {key: round(value, 4) for key, value in report.seconds.items()},
        "core": report.core,
        "variant": won.variant if won else None,
        "rung": report.attempts.index(won) if won else None,
        "attempts": [
            {
                "core": a.core,
                "variant": a.variant,
                "ok": a.ok,
                "seconds": round(a.seconds, 3),
                "reason": a.reason[:400],
            }
            for a in report.attempts
        ],
        "warnings": list(report.warnings),
        "dynamic_axes": {
            name: {str(axis): dim for axis, dim in dims.items()}
            for name, dims in report.dynamic_axes.items()
        },
    }


_EXPORTS = {
    "raw_dynamo": _raw_dynamo,
    "raw_torchscript": _raw_torchscript,
    "onnxport": _onnxport,
}


# The judgement.


def open_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def judge(case: Case, path: Path, names: list[str] | None) -> Row:
    """Compare a model with eager PyTorch at every size of the case.

    Returns:
        ``outcome``: ``right``, ``static`` (right, but an axis is fixed that need not be) or
        ``wrong``, with the reason.
    """
    try:
        session = open_session(path)
    except Exception as error:  # noqa: BLE001
        return {"outcome": "wrong", "reason": f"does not load: {first_line(error)}"}
    row: Row = {"static_axes": [], "checked": [], "skipped": [], "max_error": 0.0}
    wanted = axes(case)
    for seed, sizes in enumerate(_sizes(case), start=100):
        reason = _judge_size(case, session, names, wanted, sizes, seed, row)
        if reason:
            return row | {"outcome": "wrong", "reason": f"{_text(sizes)}: {reason}"}
    if not row["checked"]:
        return row | {"outcome": "wrong", "reason": "could not be fed at any size"}
    if row["static_axes"]:
        text = ", ".join(row["static_axes"])
        return row | {"outcome": "static", "reason": f"fixed: {text}"}
    return row | {"outcome": "right", "reason": ""}


def _text(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{dim}={size}" for dim, size in sizes.items()) or "fresh values"


def _sizes(case: Case) -> list[dict[str, int]]:
    """Observed and fresh sizes, and the observed ones with one dimension changed at a time."""
    base = dict(case.observed[0])
    single = [base | {dim: s[dim]} for s in case.fresh for dim in base]
    every = [dict(s) for s in (*case.observed, *case.fresh)] + single
    unique = list({tuple(sorted(s.items())): s for s in every}.values())
    # A model without sizes gets three calls with other values.
    return unique if unique[0] else [{}, {}, {}]


def _judge_size(
    case: Case,
    session: ort.InferenceSession,
    names: list[str] | None,
    wanted: list[dict[int, str]],
    sizes: Mapping[str, int],
    seed: int,
    row: Row,
) -> str:
    example = seeded_call(case, sizes, seed)
    flat = tensors(inputs_of(example))
    values = [to_numpy(t) for t in flat]
    leaked = _leaked(case, session, names)
    names = [*(names or []), *leaked]
    values += [to_numpy(number) for number in leaked.values()]
    flat, wanted = [*flat, *leaked.values()], [*wanted, *({} for _ in leaked)]
    indices = _match(session, names, flat)
    if indices is None:
        return f"inputs {[i.name for i in session.get_inputs()]} do not match {len(flat)} tensors"
    fixed = _fixed(session, indices, wanted, values)
    if fixed:
        row["static_axes"] = sorted({*row["static_axes"], *fixed})
        clash = _clash(session, indices, values)
        if clash:
            return ""
    try:
        references = Reference(case, example)
    except Exception as error:  # noqa: BLE001 - PyTorch itself refuses this call
        row["skipped"].append(f"{_text(sizes)}: {first_line(error)}")
        return ""
    feeds = {i.name: values[k] for i, k in zip(session.get_inputs(), indices, strict=True)}
    try:
        outputs = session.run(None, feeds)
    except Exception as error:  # noqa: BLE001
        return f"ONNX Runtime: {first_line(error)}"
    worst, reason = references.compare(outputs)
    if reason and references.is_random():
        row["random"] = True
        return f"PyTorch itself is random in eval mode; {reason}"
    if not reason:
        row["checked"].append(dict(sizes))
        row["max_error"] = max(row["max_error"], worst)
    return reason


def to_numpy(tensor: torch.Tensor) -> Any:
    value = tensor.detach().cpu()
    if value.dtype == torch.bfloat16:
        return value.float().numpy()
    return value.resolve_conj().resolve_neg().numpy().copy()


def _leaked(
    case: Case, session: ort.InferenceSession, names: list[str] | None
) -> dict[str, torch.Tensor]:
    """Numbers that ``forward`` has by default and the tracer made inputs of the model."""
    known = {name.lower() for name in names or []}
    extra = {i.name for i in session.get_inputs() if i.name.lower() not in known}
    if not extra or not known:
        return {}
    parameters = inspect.signature(seeded_module(case).forward).parameters
    return {
        name: torch.tensor(parameter.default)
        for name, parameter in parameters.items()
        if name in extra and isinstance(parameter.default, (bool, int, float))
    }


def _match(
    session: ort.InferenceSession, names: list[str] | None, flat: list[torch.Tensor]
) -> list[int] | None:
    """Give, for each input of the session, the index of its tensor: by name, else by order."""
    wanted = [i.name for i in session.get_inputs()]
    given = names or []
    lowered = [name.lower() for name in wanted]
    for candidate in (wanted, lowered):
        if len(given) == len(set(given)) == len(flat) and set(candidate) <= set(given):
            return [given.index(name) for name in candidate]
    return list(range(len(flat))) if len(wanted) == len(flat) else None


def _fixed(
    session: ort.InferenceSession,
    indices: list[int],
    wanted: list[dict[int, str]],
    values: list[Any],
) -> list[str]:
    """Name the axes that vary in the case and are fixed in the model."""
    found = []
    for item, index in zip(session.get_inputs(), indices, strict=True):
        if len(item.shape) == values[index].ndim:
            found += [
                f"{item.name}[{axis}] ({dim})"
                for axis, dim in wanted[index].items()
                if isinstance(item.shape[axis], int)
            ]
    return found


def _clash(session: ort.InferenceSession, indices: list[int], values: list[Any]) -> bool:
    return any(
        isinstance(size, int) and size != actual
        for item, index in zip(session.get_inputs(), indices, strict=True)
        for size, actual in zip(item.shape, values[index].shape, strict=False)
    )


class Reference:
    """What PyTorch computes for one call, in float32 and, where needed, in float64.

    Args:
        case: The case; a fresh module is built, so state of earlier calls has no effect.
        example: The call.
    """

    def __init__(self, case: Case, example: Example) -> None:
        self._case = case
        self._kept = copy.deepcopy(inputs_of(example))
        self._output = _eager(seeded_module(case), self._kept)
        self._noise: list[float] | None = None

    def compare(self, outputs: list[Any]) -> tuple[float, str]:
        """Return the largest error and why the outputs are not right, or ``""``."""
        results = []
        for expected in self._candidates():
            if len(expected) == len(outputs):
                results.append(self._compare(expected, outputs))
                if not results[-1][1]:
                    return results[-1]
        if results:
            return results[0]
        return 0.0, f"{len(outputs)} outputs, PyTorch gives {len(tensors(self._output))} tensors"

    def is_random(self) -> bool:
        """Whether PyTorch gives other numbers under another seed."""
        again = tensors(_eager(seeded_module(self._case), self._kept, seed=4))
        pairs = zip(tensors(self._output), again, strict=False)
        return any(_difference(a, to_numpy(b))[0] > TOLERANCE for a, b in pairs)

    def _candidates(self) -> list[list[torch.Tensor]]:
        """Orders in which an exporter may put the outputs."""
        own = tensors(self._output)
        unique = list({id(t): t for t in own}.values())
        leaves = [t for t in pytree.tree_leaves(self._output) if isinstance(t, torch.Tensor)]
        return [own, leaves, tensors(self._output, numbers=True), unique]

    def _compare(self, expected: list[torch.Tensor], outputs: list[Any]) -> tuple[float, str]:
        worst = 0.0
        for index, (reference, actual) in enumerate(zip(expected, outputs, strict=True)):
            error, reason = _difference(reference, actual)
            if reason:
                return error, f"output {index}: {reason}"
            if error > TOLERANCE and error > NOISE * self._noise_of(index):
                text = f"output {index}: error {error:.3g} of (1 + |reference|)"
                return error, f"{text}, eager's own {self._noise_of(index):.3g}"
            worst = max(worst, error)
        return worst, ""

    def _noise_of(self, index: int) -> float:
        if self._noise is None:
            self._noise = self._measure_noise()
        return self._noise[index] if index < len(self._noise) else 0.0

    def _measure_noise(self) -> list[float]:
        """Eager's own distance from a float64 copy, per output; nothing where it does not run."""
        try:
            wide = pytree.tree_map_only(
                torch.Tensor,
                lambda t: t.double() if t.is_floating_point() else t,
                copy.deepcopy(self._kept),
            )
            exact = tensors(_eager(seeded_module(self._case).double(), wide))
        except Exception:  # noqa: BLE001 - many modules make float32 tensors of their own
            return []
        pairs = zip(tensors(self._output), exact, strict=False)
        return [_difference(b, to_numpy(a), dtypes=False)[0] for a, b in pairs]


def _eager(module: nn.Module, call: tuple[Any, dict[str, Any]], seed: int = 3) -> Any:
    args, kwargs = copy.deepcopy(call)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            torch.manual_seed(seed)
            return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _difference(reference: torch.Tensor, actual: Any, dtypes: bool = True) -> tuple[float, str]:
    """Give the largest ``|d| / (1 + |reference|)``, and what differs besides numbers."""
    expected = reference.detach()
    if expected.is_complex() and not np.iscomplexobj(actual):
        expected = torch.view_as_real(expected.resolve_conj())
    wanted = to_numpy(expected)
    got = np.asarray(actual)
    if wanted.shape != got.shape:
        return 0.0, f"shape {got.shape} instead of {wanted.shape}"
    if dtypes and wanted.dtype != got.dtype:
        return 0.0, f"dtype {got.dtype} instead of {wanted.dtype}"
    if wanted.size == 0:
        return 0.0, ""
    kind = np.complex128 if np.iscomplexobj(wanted) else np.float64
    wide, other = wanted.astype(kind), got.astype(kind)
    odd = ~np.isfinite(wide)
    if not np.array_equal(odd, ~np.isfinite(other)) or not np.array_equal(
        wide[odd], other[odd], equal_nan=True
    ):
        return 0.0, "NaN or infinity at other places"
    error = np.abs(wide[~odd] - other[~odd]) / (1 + np.abs(wide[~odd]))
    return float(error.max(initial=0.0)), ""


# Eager checks and latency.


def check_eager(case: Case, stage: Stage) -> Row:
    """Run the module at every size of the case, twice; no export."""
    problems = []
    for sizes in _sizes(case):
        stage(f"eager {_text(sizes)}")
        try:
            call = inputs_of(seeded_call(case, sizes, 5))
            first = _eager(seeded_module(case), call)
            second = _eager(seeded_module(case), call, seed=4)
        except Exception as error:  # noqa: BLE001
            problems.append(f"{_text(sizes)}: {first_line(error)}")
            continue
        if not tensors(first, numbers=True):
            problems.append(f"{_text(sizes)}: no tensor in the output")
        pairs = zip(tensors(first), tensors(second), strict=True)
        if any(_difference(a, to_numpy(b))[0] > TOLERANCE for a, b in pairs):
            problems.append(f"{_text(sizes)}: random in eval mode")
    stage("axes")
    wanted = axes(case)
    problems.extend(
        f"no input follows {dim}"
        for dim in case.observed[0]
        if not any(dim in found.values() for found in wanted)
    )
    if len({s.get("batch") for s in case.observed}) > 1:
        problems.append("observed calls have several batch sizes")
    return {"outcome": "wrong" if problems else "right", "reason": "; ".join(problems)}


def latency(case: Case, folder: Path, modes: list[str], names: dict[str, Any]) -> Row:
    """Time models of one case in ONNX Runtime, turn by turn, at the observed size."""
    example = seeded_call(case, case.observed[0], 7)
    flat = tensors(inputs_of(example))
    values = [to_numpy(t) for t in flat]
    runs = {}
    for mode in modes:
        session = open_session(folder / f"{mode}.onnx")
        leaked = _leaked(case, session, names.get(mode))
        every = values + [to_numpy(number) for number in leaked.values()]
        given = [*(names.get(mode) or []), *leaked]
        indices = _match(session, given, [*flat, *leaked.values()])
        if indices is None:
            return {}
        feeds = {i.name: every[k] for i, k in zip(session.get_inputs(), indices, strict=True)}
        runs[mode] = (session, feeds)
        for _ in range(3):
            session.run(None, feeds)
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    end = time.perf_counter() + LATENCY_S
    while time.perf_counter() < end and len(times[modes[0]]) < 300:  # noqa: PLR2004
        for mode, (session, feeds) in runs.items():
            started = time.perf_counter()
            session.run(None, feeds)
            times[mode].append(time.perf_counter() - started)
    return {mode: round(1e3 * median(spent), 4) for mode, spent in times.items()}
