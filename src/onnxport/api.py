"""The engine for a module in hand: export one module, or prove a model that is already there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxport.config import ExportOptions, Inputs, Verify
from onnxport.errors import ConfigurationError, ExportError
from onnxport.exporter.confined import require_confined
from onnxport.exporter.module_state import copy_module
from onnxport.exporter.target import require_target
from onnxport.pipeline import ExportJob, GivenModule, Pipeline
from onnxport.pipeline.plan import make_plan
from onnxport.pipeline.proof import Proof
from onnxport.tree import Example, map_tensors
from onnxport.validation.session import require_runtime

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import nn

    from onnxport.config import CoreName, Precision
    from onnxport.exporter.target import Target
    from onnxport.report import Check, ExportReport

__all__ = ["export", "verify"]


def export(  # noqa: PLR0913 - flat keyword arguments, one per choice
    module: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    core: CoreName = "auto",
    target: Target | None = None,
    inputs: Inputs | None = None,
    opset: int | None = None,
    precision: Precision | None = None,
    verify: bool | Verify = True,
    variants: Iterable[str] | Mapping[str, float] = (),
    latency: bool | float = False,
) -> ExportReport:
    """Export a module to a proven ONNX model.

    The module is copied; the one given is not touched. The batch axis and other axes that vary are
    inferred; the model is published under ``path`` only after ONNX Runtime agreed with PyTorch at
    several sizes of each of them.

    Args:
        module: Any module, in any mode, on any device.
        example: A tensor, a tuple of positional arguments, a mapping of keyword arguments, an
            :class:`~onnxport.Example`, or a list of examples (several observed calls).
        path: Where the model goes; the report goes to ``<path>.json``.
        core: ``"auto"``, ``"dynamo"``, ``"trace"``, ``"script"`` or ``"torchscript"``.
        target: What to export instead of the module: the dotted name of a submodule or method, or
            a callable that gets the module and returns a module or function around it. The example
            is a call of that.
        inputs: Overrides of what is inferred.
        opset: ONNX opset version; default: torch's own.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"fp64"``; default: the module's own.
        verify: ``True`` or :class:`~onnxport.Verify`.
        variants: Smaller children to make of it: ``"fp16"``, ``"int8"``, ``"int8-static"``; see
            :class:`~onnxport.OnnxExport`. What comes of each is in ``report.variants``.
        latency: Measure how long runs take, of the model on each provider and of the module, for
            ``True``: 3 s in all, or so many seconds.

    Returns:
        The report of the published model.

    Raises:
        ConfigurationError: If an argument is wrong by itself, or there is no such target.
        MissingDependencyError: If ONNX Runtime is not installed.
        ExportError: If no core produced a model that passed the proof, or names or axes do not fit
            the module; ``report`` says why.

    Example:
        >>> import tempfile, torch, onnxport
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = onnxport.export(net, torch.randn(8, 4), f"{folder}/net.onnx", core="trace")
        >>> report.dynamic_axes
        {'input': {0: 'batch'}, 'output': {0: 'batch'}}
    """
    require_runtime()
    options = ExportOptions.of(
        core=core,
        inputs=inputs,
        opset=opset,
        precision=precision,
        verify=verify,
        variants=variants,
        latency=latency,
    )
    job = _job(module, example, Path(path), options, target)
    report = Pipeline().run(job)
    if not report.ok:
        raise ExportError(report.error or "The export failed.", report)
    return report


def verify(
    path: str | os.PathLike[str],
    module: nn.Module,
    examples: Any,
    *,
    inputs: Inputs | None = None,
    verify: Verify | None = None,
) -> list[Check]:
    """Prove that an ONNX model computes what a module computes.

    Args:
        path: The model; its inputs and outputs must have the names that :func:`export` would give,
            or those in ``inputs``.
        module: The module; it is copied and not touched.
        examples: As for :func:`export`.
        inputs: Names and axes, where they differ from what is inferred.
        verify: Tolerance, sizes and providers.

    Returns:
        The checks, all passed.

    Raises:
        VerificationError: At the first disagreement; ``checks`` holds what was compared.
        ConfigurationError: If the file does not exist.
        UnsafeFileError: If it is no model, or would have files read that are not below its folder.
    """
    require_runtime()
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"There is no model at {file}. Give the path of an .onnx file.")
    require_confined(file)
    options = ExportOptions.of(
        core="auto", inputs=inputs, opset=None, precision=None, verify=verify or True
    )
    plan = make_plan(_job(module, examples, file, options, None))
    return list(Proof(plan, options.verify).judge(file).checks)


def _job(
    module: nn.Module, example: Any, path: Path, options: ExportOptions, target: Target | None
) -> ExportJob:
    copy = copy_module(module)
    if target is not None:
        require_target(copy, target)
    given = example if options.inputs.example is None else options.inputs.example
    return ExportJob(
        source=GivenModule(copy),
        examples=read_examples(given),
        path=path,
        options=options,
        target=target or "",
    )


def read_examples(value: Any) -> tuple[Example, ...]:
    """Read one example or a list of them; tensors are brought to the CPU."""
    values = value if isinstance(value, list) else [value]
    read = [Example.of(item) for item in values]
    return tuple(
        Example(*map_tensors((example.args, dict(example.kwargs)), _on_cpu, fresh=True))
        for example in read
    )


def _on_cpu(tensor: Any) -> Any:
    return tensor.detach().cpu()
