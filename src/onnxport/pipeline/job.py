"""What the pipeline is asked to do, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from onnxport.report import Provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from onnxport._files import Ticket
    from onnxport.config import ExportOptions
    from onnxport.exporter.target import Target
    from onnxport.tree import Example

__all__ = [
    "VALIDATE",
    "CheckpointGoneError",
    "ExportJob",
    "GivenModule",
    "LiveReference",
    "ModuleMissingError",
    "ModuleSource",
    "SourceLostError",
    "Validation",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReference:
    """What the live module gave for one example with the checkpoint's weights.

    Args:
        example: The call.
        outputs: Its flat outputs, on the CPU.
        rtol: How far the copy may be from that, relative to the largest value; another device
            rounds differently.
        target: Name of what was run.
        exact: Whether it ran where the model is proven, so that the error budget holds for it.
    """

    example: Example
    outputs: tuple[torch.Tensor, ...]
    rtol: float
    target: str = ""
    exact: bool = False


class SourceLostError(Exception):
    """Raised by a source where there is nothing to report: the job is not to be done here."""


class CheckpointGoneError(SourceLostError):
    """The checkpoint was removed, or another one has its name."""


class ModuleMissingError(SourceLostError):
    """The module is needed, and it is in another process."""


class ModuleSource(Protocol):
    """Where a job's weights and, if they are needed, its module come from.

    Either method may raise :class:`SourceLostError`.
    """

    def state(self) -> Mapping[str, Any]:
        """Return the checkpoint's ``state_dict``, on the CPU, to be read only."""
        ...

    def module(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Return a module on the CPU that belongs to the caller, with these weights; and warnings.

        Raises:
            Exception: Whatever goes wrong: user code runs in here.
        """
        ...


@dataclass(frozen=True, slots=True)
class GivenModule:
    """A module that already is a copy.

    Args:
        given: The module, on the CPU.
        warnings: What is known of it.
    """

    given: nn.Module
    warnings: tuple[str, ...] = ()

    def state(self) -> Mapping[str, Any]:
        """Return the module's own ``state_dict``."""
        state: Mapping[str, Any] = self.given.state_dict()
        return state

    def module(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Return it."""
        return self.given, self.warnings


VALIDATE = "validate"
"""A stage of a job, which is skipped once it has ended a process."""


class HasDescriptor(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return its descriptor."""
        ...


@dataclass(frozen=True, slots=True)
class Validation:
    """The module's own validation, to be run on any copy of it.

    Args:
        run: Gets a module and a descriptor of the batches' file, and returns what was logged, by
            name. It is found by its name in another process.
        batches: The file.
        count: How many there are in it.
    """

    run: Callable[[nn.Module, int], Mapping[str, float]]
    batches: HasDescriptor
    count: int

    def __call__(self, module: nn.Module) -> Mapping[str, float]:
        """Run it.

        Raises:
            Exception: Whatever the module's steps and hooks raise.
        """
        return self.run(module, self.batches.fileno())


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """One set of weights to turn into one proven model.

    Args:
        source: The weights, and the module that they belong to.
        examples: Calls that the target really got; the first one decides structure and rows.
        path: Final name of the model.
        options: How to export and prove.
        target: What to export of the module; ``""``: the module itself.
        provenance: Where the weights come from.
        reference: What the live module gave, or ``None``.
        fingerprint: What of the live module is no weight, see
            :func:`onnxport.exporter.fingerprint.fingerprint`; ``None``: unknown.
        then: The same as an earlier run noted it, where the checkpoint is of that; the module must
            be as it was then.
        skip: Names of rungs that are not tried: they have ended a process.
        publish: Whether a proven model gets its name; if not, nothing is left of it.
        template: Where to keep what later models of the same module need besides their weights, or
            ``None``.
        ticket: Nobody wants the model any more once this is not valid; ``None``: it always is.
        validation: What is run with the model before it gets its name, or ``None``.
    """

    source: ModuleSource
    examples: tuple[Example, ...]
    path: Path
    options: ExportOptions
    target: Target = ""
    provenance: Provenance = field(default_factory=Provenance)
    reference: LiveReference | None = None
    fingerprint: Mapping[str, str] | None = None
    then: Mapping[str, str] | None = None
    skip: frozenset[str] = frozenset()
    publish: bool = True
    template: Path | None = None
    ticket: Ticket | None = None
    validation: Validation | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the checkpoint still is what it was."""
        return self.ticket is None or self.ticket.is_valid()

    def require_wanted(self) -> None:
        """Stop where the checkpoint is being replaced or removed.

        Raises:
            CheckpointGoneError: If so.
        """
        if not self.is_wanted:
            raise CheckpointGoneError
