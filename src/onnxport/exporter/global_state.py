"""What belongs to the whole process, and user code may change when it is run for a model."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from onnxport._torch_compat import validate_distributions, validates_distributions

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["preserved_globals"]


@contextmanager
def preserved_globals() -> Iterator[None]:
    """Put back what would change the numbers of training.

    These are the random number streams of Python, NumPy and torch (CPU and CUDA), and torch's
    default dtype, number of threads, demand for deterministic algorithms, and whether it looks at
    the arguments of distributions.
    """
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    validates = validates_distributions()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if torch.get_default_dtype() is not dtype:
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:  # setting it is dear
            torch.set_num_threads(threads)
        if (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ) != (strict, warn_only):
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        validate_distributions(validates)
