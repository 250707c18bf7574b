"""What the proof says of a model, on one execution provider after the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onnxport.errors import ProviderError
from onnxport.validation.providers import resolve_providers
from onnxport.validation.session import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from onnxport.config import Verify
    from onnxport.report import Check, Placement

__all__ = ["Verdict", "on_each_provider", "refused_before"]

logger = logging.getLogger(__name__)

_NOT_PROVEN = "Not proven on "


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What came of a proof that has found nothing wrong.

    Args:
        checks: The runs, all passed.
        placements: Where the nodes run, for each provider that says so.
        warnings: What the user should know.
        opset: Opset version of the file.
    """

    checks: tuple[Check, ...] = ()
    placements: tuple[Placement, ...] = ()
    warnings: tuple[str, ...] = ()
    opset: int | None = None

    def and_(self, other: Verdict) -> Verdict:
        """Return both as one."""
        return replace(
            self,
            checks=(*self.checks, *other.checks),
            placements=(*self.placements, *other.placements),
            warnings=(*self.warnings, *other.warnings),
        )


def on_each_provider(
    verify: Verify,
    prove: Callable[[str, tuple[Check, ...]], Verdict],
    leave_out: Iterable[str] = (),
) -> Verdict:
    """Prove on every provider that is asked for.

    With ``"auto"``, an accelerator that refuses a model, or has too little memory for it beside
    training, is a warning: whoever serves the model there is told the same. One that runs it and
    gives other numbers fails the proof, because nobody would be told of these.

    Args:
        verify: Which providers.
        prove: Proves on one of them; gets the checks made so far, for its error.
        leave_out: Providers that need not be tried.

    Raises:
        VerificationError: If the model is wrong somewhere.
        ProviderError: If it is refused where it must run.
    """
    made, without = Verdict(), frozenset(leave_out)
    for provider in resolve_providers(verify.providers):
        if provider in without:
            continue
        try:
            made = made.and_(prove(provider, made.checks))
        except ProviderError as error:
            if verify.providers != "auto" or provider == CPU:
                raise
            logger.debug("%s refuses the model", provider, exc_info=True)
            text = f"{_NOT_PROVEN}{provider}, which refuses the model. {error}"
            made = made.and_(Verdict(warnings=(text,)))
    return made


def refused_before(warnings: Iterable[str]) -> frozenset[str]:
    """Return the providers of which an earlier proof of the same graph has said that they refuse.

    Example:
        >>> refused_before(["Not proven on AnyProvider, which refuses the model. It is old."])
        frozenset({'AnyProvider'})
    """
    found = (text.removeprefix(_NOT_PROVEN) for text in warnings if text.startswith(_NOT_PROVEN))
    return frozenset(text.partition(",")[0] for text in found)
