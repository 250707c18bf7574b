"""What belongs to the whole process is put back; an exit of the user's own goes through."""

from __future__ import annotations

import random
import signal
from typing import Any

import numpy as np
import pytest
import torch

from onnxport._signals import is_of_handler
from onnxport.exporter.global_state import preserved_globals


def test_what_would_change_the_numbers_of_training_is_put_back() -> None:
    torch.set_num_threads(2)
    torch.distributions.Distribution.set_default_validate_args(True)  # whoever ran before
    before = (torch.get_default_dtype(), torch.get_num_threads(), random.getstate())
    draws = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with preserved_globals():
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.distributions.Distribution.set_default_validate_args(False)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
    assert (torch.get_default_dtype(), torch.get_num_threads(), random.getstate()) == before
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert np.array_equal(np.random.get_state()[1], draws[1])  # noqa: NPY002
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(0.0, -1.0)


def handler(*_: Any) -> None:
    raise SystemExit(3)


class Composed:
    """Calls others, as Lightning's handler does."""

    def __call__(self, *args: Any) -> None:
        for inner in (lambda *_: None, lambda *_: handler(*args)):
            inner(*args)


@pytest.mark.parametrize("handler", [handler, Composed()], ids=["function", "object"])
def test_an_exit_of_a_handler_is_told_from_one_of_the_code_that_it_interrupts(
    handler: Any,
) -> None:
    def leave() -> None:
        raise SystemExit(3)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit) as by_handler:
            signal.raise_signal(signal.SIGUSR2)
        with pytest.raises(SystemExit) as by_code:
            leave()
        assert is_of_handler(by_handler.value)
        assert not is_of_handler(by_code.value)
    finally:
        signal.signal(signal.SIGUSR2, before)
