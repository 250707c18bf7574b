"""What happens to models, workers and servers: one line each, for people and for programs."""

from __future__ import annotations

import json
import logging
import re

__all__ = ["NOT_WANTED", "event"]

logger = logging.getLogger("onnxport.events")

NOT_WANTED = "its checkpoint was saved again, or is gone"
"""Why nobody makes a model that was begun."""
_PLAIN = re.compile(r"[\w./:+@%=-]+", re.ASCII)
"""A value that needs no quotes; names of files may hold anything, line ends included."""


def event(name: str, **facts: object) -> None:
    """Log one change of state to the logger ``onnxport.events``, at level INFO.

    The line is ``name key=value ...``; a value that is no plain word is written as JSON has it. For
    handlers that write records as JSON, a record has ``event`` and ``facts`` as attributes.

    Args:
        name: What has happened, ``model.proven`` for instance.
        facts: About it; what is ``None`` is left out.

    Example:
        >>> import sys
        >>> logger.addHandler(handler := logging.StreamHandler(sys.stdout))
        >>> logger.setLevel(logging.INFO)
        >>> event("model.failed", model="last.onnx", code="OX500", error="No space.", row=None)
        model.failed model=last.onnx code=OX500 error="No space."
        >>> logger.removeHandler(handler)
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    known = {key: value for key, value in facts.items() if value is not None}
    words = [f"{key}={_word(value)}" for key, value in known.items()]
    logger.info("%s", " ".join([name, *words]), extra={"event": name, "facts": known})


def _word(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
