"""Whether a template really holds all that depends on the weights: tried with other weights."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from onnxport._torch_compat import plain_name
from onnxport.errors import VerificationError
from onnxport.exporter.writer import write_filled
from onnxport.pipeline.proof import REAL, Case, check_case
from onnxport.pipeline.runs import run_flat
from onnxport.validation.budget import pinned_reference
from onnxport.validation.session import CPU, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from onnxport.config import Tolerance
    from onnxport.exporter.flat import FlatModule
    from onnxport.exporter.frontier import Evaluate
    from onnxport.pipeline.open_template import Filled, OpenTemplate
    from onnxport.pipeline.plan import Plan
    from onnxport.signature import ModelSignature

__all__ = ["why_incomplete"]

logger = logging.getLogger(__name__)

LEAST, MOST = 1.005, 1.02
"""By what weights are multiplied: signs and orders of size stay, what was kept of the old shows."""

AMPLIFIED = 4.0
"""Other weights may amplify rounding more than those that were measured."""


def why_incomplete(
    opened: OpenTemplate,
    plan: Plan,
    inputs: Sequence[torch.Tensor],
    noise: Sequence[float],
    tolerance: Tolerance,
    folder: Path,
    evaluate: Evaluate,
) -> str:
    """Fill a template with weights that are a little different, and compare with the module.

    A number that Python took of a weight while exporting, or a weight that a patch changed, is in
    the graph for good. No list of initializers shows that; other weights do.

    Args:
        opened: The template of a model that was proven with the module's own weights.
        plan: The module and its axes.
        inputs: A call to run.
        noise: PyTorch's own relative error in each output.
        tolerance: Factor of the budget.
        folder: Where a model for this test may lie.
        evaluate: Runs prep graphs.

    Returns:
        Why the template is of no use for other weights, or ``""``. Where the module does not run
        with such weights nothing is known, and ``""`` is returned: each refresh is proven anyway.
    """
    signature = plan.signature
    try:
        root, flat = _nudged(plan)
        outputs = run_flat(flat, inputs, isolate=True)
    except Exception:
        logger.debug("The module does not run with other weights.", exc_info=True)
        return ""
    floats = all(out.is_floating_point() and bool(out.isfinite().all()) for out in outputs)
    if not floats:
        return ""  # a decision may be another one by rounding alone
    state = {plain_name(name): value for name, value in root.state_dict().items()}
    tensors = list(opened.template.fill(state, evaluate))
    case = Case(
        sizes={},
        rows=REAL,
        inputs=tuple(inputs),
        references=tuple(
            pinned_reference(out, AMPLIFIED * each, tolerance)
            for out, each in zip(outputs, noise, strict=True)
        ),
    )
    path = folder / "completeness.onnx"
    if not _agrees(signature, lambda: opened.with_tensors(tensors, CPU), case):
        write_filled(opened.template, path, tensors, dict, sync=False)
        if not _agrees(signature, lambda: Session(path, CPU, in_place=True), case):
            return (
                "Each checkpoint of this module needs an export of its own: the graph holds "
                "something that was computed from the weights in Python, or changed by a patch."
            )
    return ""


def _agrees(
    signature: ModelSignature, load: Callable[[], Session | Filled | None], case: Case
) -> bool:
    try:
        model = load()
        if model is None:
            return False
        check_case(signature, model, case, ())
    except VerificationError as error:
        logger.debug("The template is incomplete: %s", error)
        return False
    return True


def _nudged(plan: Plan) -> tuple[nn.Module, FlatModule]:
    """Return a copy whose persistent floating-point tensors are a little larger.

    Parameters are made in one pass: where they are large, a copy that is changed then takes two.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        larger = {
            id(weight): nn.Parameter(_scaled(weight, generator), weight.requires_grad)
            for weight in plan.root.parameters()
            if type(weight) is nn.Parameter and weight.is_floating_point()
        }
        done = {id(weight) for weight in larger.values()}
        root, flat = copy.deepcopy((plan.root, plan.flat), {**larger})
        for tensor in {id(t): t for t in root.state_dict(keep_vars=True).values()}.values():
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and id(tensor) not in done
            ):
                tensor.copy_(_scaled(tensor, generator))
    return root, flat


def _scaled(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # By rows: that is quick, and no layer that normalises undoes it.
    shape = (*tensor.shape[:1], *[1] * (tensor.ndim - 1))
    factor = torch.rand(shape, generator=generator) * (MOST - LEAST) + LEAST
    return tensor.detach() * factor.to(tensor.device, tensor.dtype)
