"""What happened, as values: attempts, checks and the report, with a JSON round trip."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from onnxport.errors import ExportError, OnnxportError, code_of
from onnxport.signature import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Attempt",
    "AxisEvidence",
    "Check",
    "ExportReport",
    "Latency",
    "MetricPair",
    "MetricParity",
    "OutputError",
    "Placement",
    "Provenance",
    "TrackingRecord",
    "Variant",
]


TO_REPEAT = " To repeat it: "
"""What comes before the file that repeats a failure."""
_SHARED_NAMES = frozenset({"model", "pytorch_model"})


def known_as(path: str, *, suffix: bool = True) -> str:
    """Return what people call a file of a run: its name; that of its folder, where all are alike.

    Args:
        path: Of the file.
        suffix: With the suffix of its name.

    Example:
        >>> known_as("runs/epoch=1.ckpt"), known_as("runs/checkpoint-20/model.safetensors")
        ('epoch=1.ckpt', 'checkpoint-20')
        >>> known_as("runs/checkpoint-20/model.fp16.onnx", suffix=False)
        'checkpoint-20.fp16'
    """
    file = PurePath(path.replace("\\", "/"))
    first, _, rest = file.name.partition(".")
    if first not in _SHARED_NAMES or not file.parent.name:
        return file.name if suffix else file.stem
    inner = rest.rpartition(".")[0].removeprefix("safetensors.index")
    return f"{file.parent.name}.{inner}" if inner else file.parent.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a model comes from.

    Args:
        checkpoint: Path of the checkpoint, or ``None`` when there is none.
        epoch: ``current_epoch`` at the time of saving.
        global_step: Number of optimizer steps taken.
        metrics: Metrics at the time of saving.
        monitor: Name of the metric that decides which checkpoint is best, or ``None``.
        mode: ``"min"`` or ``"max"`` for that metric.
        notes: What else the framework knows and users of the model need, in words, by name:
            written into the model.
        beside: Names of files beside the checkpoint that users of the model need: a tokenizer's.
    """

    checkpoint: str | None = None
    epoch: int | None = None
    global_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    notes: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.monitor in self.metrics:  # first: where there is room for one only
            first = {self.monitor: self.metrics[self.monitor]}
            object.__setattr__(self, "metrics", first | self.metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try of one core.

    Args:
        core: ``"dynamo"``, ``"trace"`` or ``"script"``.
        variant: How the core was asked, in a word or two, or ``""``.
        ok: Whether its model passed the proof.
        reason: Why not, in words, with the operator and the user's own line where known.
        seconds: Duration, proof included.
    """

    core: str
    variant: str = ""
    ok: bool
    reason: str = ""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputError:
    """How far one output of ONNX Runtime is from PyTorch's.

    Args:
        name: Name of the output.
        max_abs_error: Absolute difference from the float64 reference (or from PyTorch's own output
            where there is none), in units of the output, at the element that uses most of its
            budget.
        budget: What it may be there.
        ok: Every element is within its budget; equal shapes, dtypes and places of NaN and infinity.
        reason: Why not, in words.
    """

    name: str
    max_abs_error: float
    budget: float
    ok: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One run of the model in ONNX Runtime, compared with PyTorch.

    Args:
        provider: Execution provider that ran it.
        sizes: Size of each symbolic dimension.
        rows: What was fed: ``"real"`` rows of a real batch, or these rows ``"negated"``,
            ``"scaled"`` or ``"shuffled"``.
        reference: ``"float64"``; ``"float32"`` where a run in float64 would take long, with the
            budget of the shorter ones; ``"table"`` where the module does not run in float64; or
            ``"live"``: what the module in training gave with the checkpoint's weights.
        outputs: One comparison per output, in graph order.
        ok: Whether all outputs agreed.
        seconds: How long ONNX Runtime took, with weights that lie in a file as they are: a session
            that was loaded to serve may be faster.
    """

    provider: str
    sizes: dict[str, int]
    rows: str
    reference: str
    outputs: tuple[OutputError, ...]
    ok: bool
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisEvidence:
    """Why an axis is dynamic."""

    dim: str
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where ONNX Runtime runs the nodes of a model when it is asked for one provider.

    Args:
        provider: Execution provider that was asked for.
        nodes: Execution provider -> operator -> how many nodes of it run there, as they are in the
            graph: also where the provider makes one node of many.
    """

    provider: str
    nodes: dict[str, dict[str, int]]

    @property
    def elsewhere(self) -> dict[str, int]:
        """Operator -> how many nodes of it run on another provider than the one asked for."""
        found: dict[str, int] = {}
        for provider, operators in self.nodes.items():
            if provider != self.provider:
                for operator, count in operators.items():
                    found[operator] = found.get(operator, 0) + count
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How long one way of running a model takes at one batch size.

    Args:
        name: Of the way: an execution provider, ``"eager"`` or ``"compiled"``.
        batch: Rows of a run.
        runs: How many were measured.
        p50: Median, in seconds.
        p95: Of twenty runs, one takes longer; in seconds.
        throughput: Rows per second, of the median.
    """

    name: str
    batch: int
    runs: int
    p50: float
    p95: float
    throughput: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricPair:
    """One metric of the module's own validation, computed twice.

    Args:
        name: As the module logs it.
        torch: With PyTorch.
        onnx: With the ONNX model in the place of the target's ``forward``.
        ok: The second is no worse than allowed.
        reason: Why not, in words.
    """

    name: str
    torch: float
    onnx: float
    ok: bool = True
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricParity:
    """The module's own validation, run with PyTorch and with the ONNX model.

    Args:
        provider: Execution provider that ran the model.
        batches: How many batches of the validation data were used, over all loaders.
        calls: How often the ONNX model was run.
        metrics: What was logged.
        ok: No metric is worse than allowed, and the model was run.
        reason: Why not, in words.
        seconds: How long both took together.
    """

    provider: str
    batches: int
    calls: int
    metrics: tuple[MetricPair, ...]
    ok: bool
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A smaller or faster child of a proven model.

    Args:
        name: ``"fp16"``, ``"int8"`` (dynamic) or ``"int8-static"``.
        ok: Whether it was proven and published.
        path: Its file, or ``None``.
        bytes: Size of its file, external data included.
        checks: Its proof, against the same references, with a budget of its own.
        metric_parity: The module's own validation with it, or ``None``.
        latencies: How long its runs take.
        model_id: The tracking server's logged model, or ``None``.
        error: Why there is none, or ``None``.
        seconds: How long it took to make and prove.
    """

    name: str
    ok: bool
    path: str | None = None
    bytes: int | None = None
    checks: tuple[Check, ...] = ()
    metric_parity: MetricParity | None = None
    latencies: tuple[Latency, ...] = ()
    model_id: str | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def max_abs_error(self) -> float | None:
        """The largest error of any output in any check, or ``None`` without checks."""
        return _largest_error(self.checks)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingRecord:
    """What a tracking server holds of a model.

    Args:
        uri: Address of the server or database.
        run_id: The run.
        experiment_id: Its experiment.
        model_id: The logged model, or ``None``.
        registered_name: Name in the registry, or ``None``.
        version: Version in the registry, or ``None``.
        alias: The alias that was moved to this version, or ``None``.
        variants: The logged model of each variant, by name.
        missing: What could not be done, and why; ``""`` when nothing is missing.
    """

    uri: str
    run_id: str | None = None
    experiment_id: str | None = None
    model_id: str | None = None
    registered_name: str | None = None
    version: int | None = None
    alias: str | None = None
    variants: dict[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What became of one checkpoint.

    Args:
        ok: Whether a proven model was published.
        path: The model, or ``None``.
        core: The core that won: ``"dynamo"``, ``"trace"`` or ``"script"``.
        how: ``"export"``: captured and translated from the module; ``"refresh"``: the graph of an
            earlier checkpoint with this one's weights. Says nothing where there is no model.
        checkpoint: Path of the checkpoint.
        epoch: ``current_epoch`` at the time of saving.
        global_step: Number of optimizer steps taken.
        metrics: Metrics at the time of saving.
        monitor: Name of the metric that decides which checkpoint is best, or ``None``.
        mode: ``"min"`` or ``"max"`` for that metric.
        weights_sha256: Hash of the checkpoint's ``state_dict``, see
            :func:`onnxport.weights_sha256`.
        target: What was exported: ``""`` for the whole module, else the name of a submodule.
        inputs: Name, dtype and shape of each input.
        outputs: Name, dtype and shape of each output.
        dynamic_axes: Tensor name -> axis -> name of the symbolic dimension.
        evidence: Why each symbolic dimension is one.
        opset: ONNX opset version.
        attempts: One per try of a core, in order.
        checks: The proof.
        bytes: Size of the model's file, external data included.
        placements: Where its nodes run, for each provider that it was proven on; of the first
            model of its graph alone.
        latencies: How long its runs take, where that was asked for.
        metric_parity: The module's own validation with this model, or ``None``.
        variants: Its smaller and faster children.
        warnings: What the user should know.
        seconds: Duration of each stage. ``"total"``: from the saved checkpoint to the published
            model, waiting (for the worker's start, and for the models before it) included;
            ``"stall"``: how long training was held up.
        error: Why there is no model, or ``None``.
        code: Of the error; names its page in ``docs/errors``.
        tracking: What the tracking server holds, or ``None``.

    Example:
        >>> report = ExportReport(ok=False, error="No batch was seen.")
        >>> ExportReport.from_json(report.to_json()) == report
        True
    """

    ok: bool
    path: str | None = None
    core: str | None = None
    how: Literal["export", "refresh"] = "export"
    checkpoint: str | None = None
    epoch: int | None = None
    global_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    weights_sha256: str | None = None
    target: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    evidence: tuple[AxisEvidence, ...] = ()
    opset: int | None = None
    attempts: tuple[Attempt, ...] = ()
    checks: tuple[Check, ...] = ()
    bytes: int | None = None
    placements: tuple[Placement, ...] = ()
    latencies: tuple[Latency, ...] = ()
    metric_parity: MetricParity | None = None
    variants: tuple[Variant, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    code: str | None = None
    tracking: TrackingRecord | None = None

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Tensor name -> axis -> name of the symbolic dimension."""
        axes = {spec.name: spec.dynamic_axes for spec in (*self.inputs, *self.outputs)}
        return {name: dims for name, dims in axes.items() if dims}

    @property
    def max_abs_error(self) -> float | None:
        """The largest error of any output in any check, or ``None`` without checks."""
        return _largest_error(self.checks)

    @classmethod
    def begun(cls, origin: Provenance, target: str = "") -> ExportReport:
        """Return the report of weights that are not a model yet.

        Args:
            origin: Where the weights come from.
            target: What is exported, in words; ``""``: the whole module.
        """
        return cls(
            ok=False,
            checkpoint=origin.checkpoint,
            epoch=origin.epoch,
            global_step=origin.global_step,
            metrics=origin.metrics,
            monitor=origin.monitor,
            mode=origin.mode,
            target=target,
        )

    @classmethod
    def of_failure(
        cls, error: str, origin: Provenance, code: str = ExportError.code
    ) -> ExportReport:
        """Return the report of weights that did not even get to an export.

        Args:
            error: Why.
            origin: Where the weights come from.
            code: Of the error.
        """
        return replace(cls.begun(origin), error=error, code=code)

    def failed(self, error: BaseException) -> ExportReport:
        """Return the same report, of an export that has failed like this."""
        ours = isinstance(error, OnnxportError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        return replace(self, ok=False, path=None, error=text, code=code_of(error))

    def with_tracking(self, record: TrackingRecord) -> ExportReport:
        """Return the same report with what the tracking server holds."""
        variants = tuple(
            replace(one, model_id=record.variants.get(one.name)) for one in self.variants
        )
        return replace(self, tracking=record, variants=variants)

    def to_json(self) -> str:
        """Return strict JSON; numbers that are not finite are written as strings."""
        data = asdict(self) | {"dynamic_axes": self.dynamic_axes}
        return json.dumps(_encode(data), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ExportReport:
        """Read what :meth:`to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExportReport:
        """Read what the JSON of :meth:`to_json` holds."""
        data = dict(data)
        data.pop("dynamic_axes", None)
        tracking = data.pop("tracking", None)
        parity = data.pop("metric_parity", None)  # and others that an older report does not have
        return cls(
            **data
            | {
                "metrics": {key: float(value) for key, value in data["metrics"].items()},
                "inputs": tuple(TensorSpec.from_dict(spec) for spec in data["inputs"]),
                "outputs": tuple(TensorSpec.from_dict(spec) for spec in data["outputs"]),
                "evidence": tuple(AxisEvidence(**item) for item in data["evidence"]),
                "attempts": tuple(Attempt(**attempt) for attempt in data["attempts"]),
                "checks": _checks(data["checks"]),
                "placements": tuple(Placement(**one) for one in data.get("placements", ())),
                "latencies": _latencies(data.get("latencies", ())),
                "metric_parity": None if parity is None else _parity(parity),
                "variants": tuple(_variant(one) for one in data.get("variants", ())),
                "warnings": tuple(data["warnings"]),
                "tracking": None if tracking is None else TrackingRecord(**tracking),
            }
        )


def _largest_error(checks: Iterable[Check]) -> float | None:
    return max((one.max_abs_error for check in checks for one in check.outputs), default=None)


def _checks(data: Iterable[dict[str, Any]]) -> tuple[Check, ...]:
    return tuple(_check(check) for check in data)


def _latencies(data: Iterable[dict[str, Any]]) -> tuple[Latency, ...]:
    return tuple(Latency(**one | {"throughput": float(one["throughput"])}) for one in data)


def _parity(data: dict[str, Any]) -> MetricParity:
    metrics = tuple(
        MetricPair(**one | {"torch": float(one["torch"]), "onnx": float(one["onnx"])})
        for one in data["metrics"]
    )
    return MetricParity(**data | {"metrics": metrics})


def _variant(data: dict[str, Any]) -> Variant:
    parity = data["metric_parity"]
    return Variant(
        **data
        | {
            "checks": _checks(data["checks"]),
            "metric_parity": None if parity is None else _parity(parity),
            "latencies": _latencies(data["latencies"]),
        }
    )


def _check(data: dict[str, Any]) -> Check:
    outputs = tuple(
        OutputError(
            **output
            | {
                "max_abs_error": float(output["max_abs_error"]),
                "budget": float(output["budget"]),
            }
        )
        for output in data["outputs"]
    )
    return Check(**data | {"outputs": outputs})


def _encode(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):  # noqa: PLR0124
        return str(value)
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value
