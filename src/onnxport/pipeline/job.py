"""What the pipeline is asked to do, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onnxport.report import Provenance

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from onnxport.config import ExportOptions
    from onnxport.exporter.target import Target
    from onnxport.tree import Example

__all__ = ["ExportJob", "LiveReference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReference:
    """What the live module gave for one example with the checkpoint's weights.

    Args:
        example: The call.
        outputs: Its flat outputs, on the CPU.
        rtol: How far the copy may be from that, relative to the largest value; another device
            rounds differently.
        target: Name of what was run.
    """

    example: Example
    outputs: tuple[torch.Tensor, ...]
    rtol: float
    target: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """One module to turn into one proven model.

    Args:
        module: A copy that belongs to the job: on the CPU, with the checkpoint's weights.
        examples: Calls that the target really got; the first one decides structure and rows.
        path: Final name of the model.
        options: How to export and prove.
        target: What to export of the module; ``""``: the module itself.
        weights_sha256: Hash of the checkpoint's ``state_dict``.
        provenance: Where the weights come from.
        reference: What the live module gave, or ``None``.
        warnings: What is already known and goes to the report.
    """

    module: nn.Module
    examples: tuple[Example, ...]
    path: Path
    options: ExportOptions
    target: Target = ""
    weights_sha256: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    reference: LiveReference | None = None
    warnings: tuple[str, ...] = ()
