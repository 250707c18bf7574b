"""A template that is loaded in ONNX Runtime once, and gets the weights with each run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from onnxport.errors import VerificationError
from onnxport.exporter.model_file import mapped_weights, with_weights_as_inputs
from onnxport.validation.session import CPU, Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from onnxport.exporter.template import Template
    from onnxport.report import Check

__all__ = ["Filled", "OpenTemplate"]

logger = logging.getLogger(__name__)


class OpenTemplate:
    """Sessions of a template without weights, made when they are asked for.

    Loading a graph takes as long as running it once; its weights are all that changes.

    Args:
        template: The template.

    Attributes:
        template: The same.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self._sessions: dict[str, Session | None] = {}

    @override
    def __reduce__(self) -> Any:
        return OpenTemplate, (self.template,)  # sessions are of a process

    def with_file(self, path: Path, provider: str) -> Filled | None:
        """Return a model as it lies in a file.

        Args:
            path: A model that was written from the template.
            provider: Execution provider.

        Returns:
            ``None`` where the graph does not load without its weights, because some operators want
            these to be constants, and on accelerators, where a session that stays takes memory.

        Raises:
            PublishError: If the file was not written from the template.
        """
        parts = (self.template.head, self.template.graph, self.template.slots)
        session = self._session(provider)
        return None if session is None else Filled(session, mapped_weights(path, *parts))

    def with_tensors(self, tensors: Sequence[torch.Tensor], provider: str) -> Filled | None:
        """Return a model with one tensor for each slot; see :meth:`with_file`."""
        session = self._session(provider)
        names = [slot.name for slot in self.template.slots]
        return None if session is None else Filled(session, dict(zip(names, tensors, strict=True)))

    def close(self) -> None:
        """Let go of the sessions; they are made again when they are asked for."""
        self._sessions.clear()

    def _session(self, provider: str) -> Session | None:
        if provider != CPU:
            return None  # an accelerator's memory is training's
        if provider not in self._sessions:
            template = self.template
            model = with_weights_as_inputs(template.head, template.graph, template.slots)
            try:
                # The thread that hashed the weights only waits for the disk when this runs.
                self._sessions[provider] = Session(model, provider, in_place=True, spare=1)
            except VerificationError:
                logger.debug("The graph does not load without its weights.", exc_info=True)
                self._sessions[provider] = None
        return self._sessions[provider]


class Filled:
    """A template's session with one set of weights.

    Args:
        session: The session.
        weights: The tensor of each slot.
    """

    def __init__(
        self, session: Session, weights: Mapping[str, torch.Tensor | np.ndarray[Any, Any]]
    ) -> None:
        self.provider = session.provider
        self._session, self._weights = session, weights

    def run(
        self, names: Sequence[str], tensors: Sequence[torch.Tensor], checks: tuple[Check, ...] = ()
    ) -> list[torch.Tensor]:
        """Run once, see :meth:`~onnxport.validation.session.Session.run`.

        Raises:
            VerificationError: If ONNX Runtime fails.
        """
        weights = self._weights
        return self._session.run([*names, *weights], [*tensors, *weights.values()], checks)
