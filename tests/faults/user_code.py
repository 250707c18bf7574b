"""Faults of the user's own code: modules that raise, hold what cannot be copied, or meddle."""

from __future__ import annotations

import random
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from faults.catalogue import CATALOGUE, STEPS, Fault, Outcome
from faults.ground import Net, train, undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.catalogue import Site

_fired: list[str] = []
"""What has happened in this process since the injection began."""


def _note(what: str) -> None:
    _fired.append(what)


class Evil(Net):
    """Does something in ``forward`` in eval mode, which training itself never calls.

    Args:
        what: Key of :data:`MEDDLING`.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.meddle()
        return super().forward(x)

    @torch.jit.unused
    def meddle(self) -> None:
        """Do it."""
        _note(self.what)
        MEDDLING[self.what](self)


def _raises(error: BaseException) -> Callable[[Any], None]:
    def meddle(_: Any) -> None:
        raise error

    return meddle


def _warn(_: Any) -> None:
    import warnings

    warnings.warn("of the user's own", RuntimeWarning, stacklevel=2)


def _write_weights(module: Any) -> None:
    with torch.no_grad():
        module.head.weight.add_(1.0)


def _replace_a_weight(module: Any) -> None:
    module.head.weight = nn.Parameter(torch.zeros_like(module.head.weight))


def _grow(module: Any) -> None:
    module.more = nn.Linear(2, 2)


MEDDLING: dict[str, Callable[[Any], Any]] = {
    "raises an exception": _raises(RuntimeError("of the user's own")),
    "raises SystemExit": _raises(SystemExit(3)),
    "raises MemoryError": _raises(MemoryError()),
    "seeds torch": lambda _: torch.manual_seed(0),
    "seeds Python": lambda _: random.seed(0),
    "seeds NumPy": lambda _: np.random.seed(0),  # noqa: NPY002 - what is tried
    "draws random numbers": lambda _: torch.rand(100),
    "sets the default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "turns gradients on": lambda _: torch.set_grad_enabled(True),
    "turns gradients off": lambda _: torch.set_grad_enabled(False),
    "sets the number of threads": lambda _: torch.set_num_threads(1),
    "turns to training mode": lambda module: module.train(),
    "freezes itself": lambda module: module.requires_grad_(False),
    "writes to its weights": _write_weights,
    "replaces a weight": _replace_a_weight,
    "adds a submodule": _grow,
    "warns": _warn,
}

_NO_MODEL = "models that cannot be: each report says why"
_MAY_FAIL = frozenset(
    {
        *("raises an exception", "raises SystemExit", "raises MemoryError"),
        *("turns to training mode", "writes to its weights", "adds a submodule"),
    }
)


def _meddles(site: Site, what: str) -> Outcome:
    _fired.clear()
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    make = partial(Evil, what)
    try:
        run = site.train(make=make)
        changed = torch.get_default_dtype() is not default, torch.get_num_threads() != threads
        wanted = undisturbed(STEPS)
        # It meddles with the judge, too.
        outcome = site.judge(run, "; ".join(_fired[:1]), losses=wanted, again=False, make=make)
    finally:
        torch.set_default_dtype(default)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
    if any(changed):
        outcome.problems.append("the default dtype, or the number of threads, is another one")
    if outcome.failed and what not in _MAY_FAIL:
        errors = {report.error for report in run.reports if not report.ok}
        outcome.problems.append(f"{outcome.failed} checkpoints have no model: {errors}")
    return outcome


# --- modules that hold things, or whose methods raise -------------------------------------------


class Holder(Net):
    """Holds something that no other process can have."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing


class RaisesInGetstate(Net):
    """Cannot be pickled."""

    def __getstate__(self) -> Any:
        _note("__getstate__")
        raise RuntimeError("of the user's own")


class RaisesInReduce(Net):
    """Cannot be pickled or copied."""

    def __reduce_ex__(self, _: Any) -> Any:
        _note("__reduce_ex__")
        raise RuntimeError("of the user's own")


class RaisesInDeepcopy(Net):
    """Cannot be copied."""

    def __deepcopy__(self, _: Any) -> Any:
        _note("__deepcopy__")
        raise RuntimeError("of the user's own")


class RaisesInDel(Net):
    """Raises when it goes, as copies of it do."""

    def __del__(self) -> None:
        _note("__del__")
        raise RuntimeError("of the user's own")


class RaisesInProperty(Net):
    """Has a property that cannot be asked."""

    @property
    def broken(self) -> Any:
        _note("a property")
        raise RuntimeError("of the user's own")


class RaisesInHook(Net):
    """Has a hook that raises in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(_hook)


def _hook(module: nn.Module, *_: Any) -> None:
    if not module.training:
        _note("a hook")
        raise RuntimeError("of the user's own")


class HooksItsState(Net):
    """Has a hook on its state_dict that takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(lambda *_: (time.sleep(0.01), _note("state_dict"))[0])


class SpawnsThread(Net):
    """Starts a thread whenever it is called, which waits for a moment."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            self.spawn()
        return super().forward(x)

    @torch.jit.unused
    def spawn(self) -> None:
        """Start it."""
        _note("a thread")
        threading.Thread(target=time.sleep, args=(0.05,)).start()


class SpawnsProcess(Net):
    """Starts a process whenever it is called in eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.spawn()
        return super().forward(x)

    @torch.jit.unused
    def spawn(self) -> None:
        """Start it."""
        _note("a process")
        subprocess.run([sys.executable, "-c", ""], check=True)


def _generator() -> Any:
    yield 1


def _memory() -> Any:
    return sqlite3.connect(":memory:")


def _pair() -> Any:
    return socket.socketpair()[0]


HELD: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "a thread": lambda: threading.Thread(target=time.sleep, args=(0.1,)),
    "a socket": _pair,
    "an open file": tempfile.TemporaryFile,
    "a generator": _generator,
    "a database": _memory,
    "a weak reference": lambda: weakref.ref(_pair),
    "a function of this place": lambda: lambda x: x,
    "a module": lambda: sys,
}

RAISING: dict[str, Callable[[], Net]] = {
    "__getstate__ raises": RaisesInGetstate,
    "__reduce_ex__ raises": RaisesInReduce,
    "__deepcopy__ raises": RaisesInDeepcopy,
    "__del__ raises": RaisesInDel,
    "a hook raises": RaisesInHook,
    "a hook of state_dict is slow": HooksItsState,
    "forward starts threads": SpawnsThread,
    "forward starts processes": SpawnsProcess,
}


def _raises_somewhere(site: Site, make: Callable[[], Net], core: str = "trace") -> Outcome:
    _fired.clear()
    run = site.train(make=make, export=site.export(core=core, background=core != "script"))
    return site.judge(run, "; ".join(_fired[:1]), make=Net, again=False)


def _holds(site: Site, thing: Callable[[], Any]) -> Outcome:
    held = thing()
    with closing(held) if hasattr(held, "close") else nullcontext():
        run = site.train(make=lambda: Holder(held))
        outcome = site.judge(run, type(held).__name__, again=False)
    if outcome.failed:
        errors = {report.error for report in run.reports if not report.ok}
        outcome.problems.append(f"{outcome.failed} checkpoints have no model: {errors}")
    return outcome


class _StepFails(Net):
    """Fails in the middle of training."""

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if len(self.losses) == STEPS - 2:
            _note("training_step")
            raise ZeroDivisionError("of the user's own")
        return super().training_step(batch, index)


def _step_fails(site: Site) -> Outcome:
    _fired.clear()
    run = site.train(make=_StepFails)
    return site.judge(run, "; ".join(_fired), error=ZeroDivisionError, make=Net)


def _same_without(site: Site) -> Outcome:
    """Two runs with a callback, and none without, must end alike: the control of all others."""
    run = train(site.checkpoints, site.export(), steps=STEPS)
    return site.judge(run, "nothing")


def _register() -> None:
    for what in MEDDLING:
        lost = _NO_MODEL if what in _MAY_FAIL else ""
        inject = partial(_meddles, what=what)
        CATALOGUE.append(Fault(f"forward in eval mode {what}", "user code", lost, inject, 3))
    for name, make in RAISING.items():
        inject = partial(_raises_somewhere, make=make)
        CATALOGUE.append(Fault(name, "user code", _NO_MODEL, inject, 3))
    inject = partial(_raises_somewhere, make=RaisesInProperty, core="script")
    CATALOGUE.append(Fault("a property raises", "user code", _NO_MODEL, inject, 3))
    for name, thing in HELD.items():
        inject = partial(_holds, thing=thing)
        CATALOGUE.append(Fault(f"the module holds {name}", "user code", "", inject, 3))
    CATALOGUE.append(Fault("training_step raises", "user code", "", _step_fails, 5))
    CATALOGUE.append(Fault("nothing, for comparison", "none", "", _same_without, 5))


_register()
