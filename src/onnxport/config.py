"""Options as frozen values, checked once when they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from onnxport.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Background",
    "CoreName",
    "ExportOptions",
    "Inputs",
    "MLflow",
    "Metrics",
    "Precision",
    "Tolerance",
    "Verify",
]

CoreName = Literal["auto", "dynamo", "trace", "script", "torchscript"]
Precision = Literal["fp32", "fp16", "bf16", "fp64"]

CORES: tuple[str, ...] = ("auto", "dynamo", "trace", "script", "torchscript")
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16", "fp64")
VARIANTS: dict[str, float] = {"fp16": 0.01, "int8": 0.15, "int8-static": 0.15}
"""Kinds of variants, and how far their outputs may be from PyTorch's, as a part of the largest
value of each output."""
POLICIES: tuple[str, ...] = ("best", "all", "end")
MIN_OPSET = 11
MAX_NICENESS = 19
LATENCY_S = 3.0
"""What ``latency=True`` means."""


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ConfigurationError: With the value and the choices.
    """
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What would otherwise be observed and inferred.

    Args:
        example: A tensor, a tuple of positional arguments, a mapping of keyword arguments, an
            :class:`~onnxport.Example`, or a list of examples.
        names: Names of the graph's inputs, in order.
        output_names: Names of the graph's outputs, in order.
        dynamic_axes: For each input or output named here: axis -> name of the dimension, or a list
            of axes. Replaces what is inferred for every input; outputs follow by running the model.
        leave_out: Names of arguments of ``forward`` that are seen in training and that the model
            does not get, labels for instance: what is computed from them alone (a loss) is no
            output then. Default: what the framework says are labels, where it says so.

    Example:
        >>> Inputs(names=("image",), dynamic_axes={"image": {0: "batch"}}).names
        ('image',)
    """

    example: Any = None
    names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    dynamic_axes: Mapping[str, Mapping[int, str] | tuple[int, ...] | list[int]] | None = None
    leave_out: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("names", "output_names", "leave_out"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigurationError(
                    f"Inputs({name}=) must be a tuple of names, got the string {value!r}. "
                    f"Write ({value!r},)."
                )
            if value is not None:
                object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far ONNX Runtime's outputs may be from PyTorch's.

    By default an error budget is measured: PyTorch runs in float64 on the same rows, and ONNX
    Runtime may be ``factor`` times further from that than PyTorch's own precision is.

    Args:
        factor: Dimensionless; at least 1.
        atol: If given (with ``rtol`` or alone), replaces the measured budget: in units of the
            output.
        rtol: Dimensionless, times the absolute value of each element.

    Raises:
        ConfigurationError: If a value is negative or ``factor`` is below 1.
    """

    factor: float = 8.0
    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigurationError(f"Tolerance(factor=) must be at least 1, got {self.factor!r}.")
        for name in ("atol", "rtol"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigurationError(f"Tolerance({name}=) must be >= 0, got {value!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """How a model is proven.

    Args:
        tolerance: See :class:`Tolerance`.
        providers: ``"auto"``: CPU, and each accelerator provider that can really run, but those
            that compile for minutes (TensorRT, MIGraphX); or the names of ONNX Runtime execution
            providers, each of which must really run, and run nodes of the model.
        sizes: Batch sizes to prove; default: 1, 2, the observed one and an odd larger one.
        seconds_per_run: A batch size is lowered when one eager run of it would take longer than
            this; in seconds.
        gpu_memory_mb: What a check may take of a GPU's memory, in MiB; default: a quarter of what
            is free when it begins. With ``providers="auto"`` a model that needs more is proven on
            the CPU, and the report says so.

    Raises:
        ConfigurationError: If a size or the memory is below 1, or there are no providers.
    """

    tolerance: Tolerance = field(default_factory=Tolerance)
    providers: Literal["auto"] | tuple[str, ...] = "auto"
    sizes: tuple[int, ...] | None = None
    seconds_per_run: float = 5.0
    gpu_memory_mb: int | None = None

    def __post_init__(self) -> None:
        if self.providers != "auto":
            if isinstance(self.providers, str) or not self.providers:  # type: ignore[redundant-expr]
                raise ConfigurationError(
                    "Verify(providers=) must be 'auto' or a tuple of provider names such as "
                    f"('CPUExecutionProvider',); got {self.providers!r}."
                )
            object.__setattr__(self, "providers", tuple(self.providers))
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            if not self.sizes or min(self.sizes) < 1:
                raise ConfigurationError(
                    f"Verify(sizes=) must hold batch sizes of at least 1, got {self.sizes!r}."
                )
        memory = self.gpu_memory_mb
        if memory is not None and not (_is_whole(memory) and memory >= 1):
            raise ConfigurationError(
                f"Verify(gpu_memory_mb=) must be a whole number of MiB, got {memory!r}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """How the module's own validation is run with the ONNX model in the place of the module.

    The batches of one validation run are kept, and both are run on them, on the CPU.

    Args:
        batches: How many of each loader; ``None``: all of them, as far as they take 1 GiB.
        every_n_checkpoints: Validate the first model and then each n-th.
        max_degradation: How much worse a metric may be, as a part of PyTorch's own value: 0.01 is
            one percent. For the monitored metric worse is what its mode says; another one may not
            differ by more in either direction. A mapping says so by name; what it does not name
            may differ by anything.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> Metrics(batches=10, max_degradation={"val_acc": 0.005}).allowed("val_loss")
        inf
    """

    batches: int | None = None
    every_n_checkpoints: int = 1
    max_degradation: float | Mapping[str, float] = 0.01

    def __post_init__(self) -> None:
        for name in ("batches", "every_n_checkpoints"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise ConfigurationError(
                    f"Metrics({name}=) must be a whole number of at least 1; got {value!r}."
                )
        limits = self.max_degradation
        for limit in limits.values() if isinstance(limits, Mapping) else (limits,):
            if not _is_number(limit) or not limit >= 0:
                raise ConfigurationError(
                    f"Metrics(max_degradation=) must be at least 0, or a mapping of names to such "
                    f"numbers; got {limits!r}."
                )

    def allowed(self, name: str) -> float:
        """Return how much worse a metric may be, as a part of its value."""
        limits = self.max_degradation
        return limits.get(name, math.inf) if isinstance(limits, Mapping) else limits

    @classmethod
    def of(cls, value: bool | int | Metrics) -> Metrics | None:
        """Read the flat argument of a callback: whether, how many batches, or all of it.

        Raises:
            ConfigurationError: If it is none of these.
        """
        if isinstance(value, cls):
            return value
        if value is True or value is False:
            return cls() if value else None
        if isinstance(value, int):
            return cls(batches=value)
        raise ConfigurationError(
            "validate_metrics must be True, False, a number of batches or Metrics(...); "
            f"got {value!r}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """How the worker processes live in which models are made beside training.

    Args:
        max_workers: How many there may be; more than one is of use for several targets.
        threads: Threads of each; training keeps the others.
        niceness: Added to the priority number, 0 to 19; 19: a worker runs when nobody else wants
            to.
        memory_gb: What each may allocate, in GiB, beside mapped files; ``None``: no limit. An
            export that needs more fails, and training does not notice.
        stage_timeout_s: A worker that says nothing for so long is ended, in seconds; what it tried
            is not tried again.
        drain_s: How long the end of ``fit`` waits for models that are not finished, in seconds.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> Background(drain_s=60).max_workers
        1
    """

    max_workers: int = 1
    threads: int = 1
    niceness: int = 19
    memory_gb: float | None = None
    stage_timeout_s: float = 1800.0
    drain_s: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("max_workers", "threads"):
            self._require(name, _is_whole, lambda value: value >= 1, "a whole number of at least 1")
        self._require(
            "niceness",
            _is_whole,
            lambda value: 0 <= value <= MAX_NICENESS,
            f"a whole number from 0 to {MAX_NICENESS}",
        )
        self._require("stage_timeout_s", _is_number, lambda value: value > 0, "seconds above 0")
        self._require("drain_s", _is_number, lambda value: value >= 0, "seconds, at least 0")
        if self.memory_gb is not None:
            self._require("memory_gb", _is_number, lambda value: value > 0, "GiB above 0, or None")

    def _require(
        self,
        name: str,
        is_kind: Callable[[object], bool],
        is_allowed: Callable[[Any], bool],
        wanted: str,
    ) -> None:
        value = getattr(self, name)
        if not is_kind(value) or not is_allowed(value):
            raise ConfigurationError(f"Background({name}=) must be {wanted}; got {value!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLflow:
    """How proven models are tracked and registered.

    Args:
        tracking_uri: Where to track when the trainer has no ``MLFlowLogger``; default:
            ``MLFLOW_TRACKING_URI``, else a sqlite store under the trainer's root directory.
        experiment: Name of the experiment of a run that we start.
        register: Name in the model registry; ``None``: do not register.
        alias: The alias that points to the best proven version.
        policy: ``"best"``: a version for each model that becomes the best; ``"all"``: a version for
            each proven model; ``"end"``: one version, of the best model, at the end of training.
        min_delta: By how much the monitored metric must be better for the alias to move.

    Raises:
        ConfigurationError: If a name is not legal in MLflow's registry, or a choice is unknown.

    Source: MLflow's rules for model names (no ``/`` or ``:``) and aliases (letters, digits, ``-``
    and ``_``; ``latest`` and ``v<digits>`` are reserved).
    """

    tracking_uri: str | None = None
    experiment: str = "onnxport"
    register: str | None = None
    alias: str = "champion"
    policy: Literal["best", "all", "end"] = "best"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require_choice("MLflow(policy=)", self.policy, POLICIES)
        if self.register is not None and not re.fullmatch(
            r"(?!\s*$|\.{1,2}$)[^/:]+", self.register
        ):
            raise ConfigurationError(
                f"A registered model's name must not be empty or hold '/' or ':'; "
                f"got {self.register!r}."
            )
        if not re.fullmatch(r"(?!(?i:latest|v\d+)$)[A-Za-z0-9_-]{1,255}", self.alias):
            raise ConfigurationError(
                "MLflow(alias=) may hold letters, digits, '-' and '_', and must not be 'latest' or "
                f"'v<digits>'; got {self.alias!r}."
            )
        if not self.min_delta >= 0:
            raise ConfigurationError(f"MLflow(min_delta=) must be >= 0, got {self.min_delta!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Everything that decides how one module becomes one proven model.

    Args:
        core: Which exporter to use; ``"auto"`` tries dynamo, trace and script in this order,
            ``"torchscript"`` trace and script.
        inputs: Overrides of what is observed and inferred.
        opset: ONNX opset version; default: torch's own.
        precision: Cast to this precision before exporting; default: the checkpoint's own, as far
            as ONNX Runtime can run it.
        verify: How to prove.
        metrics: How to run the module's own validation with the model, or ``None``: not at all.
        variants: Which smaller children to make, with the budget of each.
        latency_s: How long it may take to measure how long runs take, in seconds; 0: not at all.

    Raises:
        ConfigurationError: If a choice is unknown or the opset is not one.
    """

    core: CoreName = "auto"
    inputs: Inputs = field(default_factory=Inputs)
    opset: int | None = None
    precision: Precision | None = None
    verify: Verify = field(default_factory=Verify)
    metrics: Metrics | None = None
    variants: tuple[tuple[str, float], ...] = ()
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        require_choice("core", self.core, CORES)
        if self.precision is not None:
            require_choice("precision", self.precision, PRECISIONS)
        if self.opset is not None and (type(self.opset) is not int or self.opset < MIN_OPSET):
            raise ConfigurationError(
                f"opset must be a whole number of at least {MIN_OPSET}, got {self.opset!r}."
            )

    @classmethod
    def of(
        cls,
        *,
        core: CoreName,
        inputs: Inputs | None,
        opset: int | None,
        precision: Precision | None,
        verify: bool | Verify,
        validate_metrics: bool | int | Metrics = False,
        variants: Iterable[str] | Mapping[str, float] = (),
        latency: bool | float = False,
    ) -> ExportOptions:
        """Make options from the flat arguments of the public functions.

        Raises:
            ConfigurationError: If ``verify`` is false: nothing unproven is ever published; or if
                ``latency`` is no time.
        """
        if verify is not True and not isinstance(verify, Verify):
            raise ConfigurationError(
                f"verify must be True or Verify(...), got {verify!r}: nothing unproven is "
                "published. Use Verify(tolerance=Tolerance(...)) to state another tolerance."
            )
        if inputs is not None and not isinstance(inputs, Inputs):
            raise ConfigurationError(
                f"inputs must be Inputs(...), got {type(inputs).__name__}. "
                "Write inputs=Inputs(example=...)."
            )
        return cls(
            core=core,
            inputs=inputs if inputs is not None else Inputs(),
            opset=opset,
            precision=precision,
            verify=verify if isinstance(verify, Verify) else Verify(),
            metrics=Metrics.of(validate_metrics),
            variants=_read_variants(variants),
            latency_s=_read_latency(latency),
        )


def _read_variants(given: Iterable[str] | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Return names and budgets.

    Raises:
        ConfigurationError: If a name is unknown, or a budget is no positive number.
    """
    if isinstance(given, str):
        raise ConfigurationError(
            f"variants must be a tuple of names, got {given!r}. Write ({given!r},)."
        )
    for name in given:
        require_choice("variants", name, tuple(VARIANTS))
    budgets = (
        dict(given) if isinstance(given, Mapping) else {name: VARIANTS[name] for name in given}
    )
    for name, budget in budgets.items():
        if not _is_number(budget) or not budget > 0:
            raise ConfigurationError(
                f"variants={{{name!r}: ...}} must be a number above 0: how far outputs may be from "
                f"PyTorch's, as a part of their largest value; got {budget!r}."
            )
    return tuple(budgets.items())


def _read_latency(latency: object) -> float:
    if isinstance(latency, bool):
        return LATENCY_S if latency else 0.0
    if isinstance(latency, (int, float)) and 0 <= latency < math.inf:
        return float(latency)
    raise ConfigurationError(f"latency must be True, False or seconds, got {latency!r}.")
