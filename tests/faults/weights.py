"""Faults of the weights: no numbers, other shapes, changes while they are copied."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from faults.catalogue import CATALOGUE, STEPS, Fault, Outcome
from faults.ground import EVERY, Net, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.catalogue import Site

NAN, INF = float("nan"), float("inf")


class AtStep(Callback):
    """Changes the module once, before a step.

    Args:
        step: Which.
        change: How.
    """

    def __init__(self, step: int, change: Callable[[Any], None]) -> None:
        self.step, self.change, self.fired = step, change, ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.fired:
            self.fired = f"before step {self.step}"
            with torch.no_grad():
                self.change(pl_module)


def _filled(value: float) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.head.weight.view(-1)[3] = value

    return change


def _all(value: float) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.head.weight.fill_(value)

    return change


def _new_object(module: Any) -> None:
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())


def _more(module: Any) -> None:
    module.register_buffer("more", torch.ones(3))


def _tie(module: Any) -> None:
    module.body[0].bias.data = module.body[1].weight.data


CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    # what, and whether the checkpoints after it can have models that are compared here
    "one weight is NaN": (_filled(NAN), True),
    "one weight is infinite": (_filled(INF), True),
    "all weights of a layer are NaN": (_all(NAN), True),
    "all weights of a layer are zero": (_all(0.0), True),
    "weights are subnormal": (_all(1e-42), True),
    "weights are huge": (_all(3e38), True),
    "a parameter becomes another object": (_new_object, True),
    "a buffer comes": (_more, False),
    "two parameters share their memory": (_tie, True),
}


def _changes(site: Site, change: Callable[[Any], None], *, plain: bool) -> Outcome:
    step = site.random.choice(range(EVERY, STEPS, EVERY))
    with_it = AtStep(step, change)
    run = site.train(with_it)
    folder = type(site)(site.folder / "without", site.random)
    alone = train(folder.checkpoints, None, AtStep(step, change), steps=STEPS)
    losses = tuple(alone.losses)
    if any(loss != loss for loss in losses):  # noqa: PLR0124 - NaN is equal to nothing
        same = repr(run.losses) == repr(alone.losses)
        run.losses, losses = ([], ()) if same else ([1.0], ())
    make = Net if plain else _Any
    return site.judge(run, with_it.fired, losses=losses, again=False, make=make)


class _Any(Net):
    """Takes the weights of any of them."""

    def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
        kinds = {name: value.dtype for name, value in super().state_dict().items()}
        known = {name: value.to(kinds[name]) for name, value in state.items() if name in kinds}
        return super().load_state_dict(known)


class _Stirred(Net):
    """A thread of the user's writes to a buffer all the time; the loss does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stirred", torch.zeros(1 << 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.training else out + self.stirred.mean()


class _Stirrer(Callback):
    """Runs the thread."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.rounds = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.thread = threading.Thread(target=self._stir, args=(pl_module.stirred,))
        self.thread.start()

    def _stir(self, buffer: torch.Tensor) -> None:
        while not self.over.wait(0.0005):
            buffer.add_(1.0)
            self.rounds += 1

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.over.set()
        self.thread.join()


def _are_stirred(site: Site) -> Outcome:
    stirrer = _Stirrer()
    run = site.train(stirrer, make=_Stirred)
    return site.judge(run, f"{stirrer.rounds} changes", make=_Stirred, again=False)


_STIRRED = "a model whose weights changed between the checkpoint and its proof; its report says so"


def _register() -> None:
    for name, (change, plain) in CHANGES.items():
        inject = partial(_changes, change=change, plain=plain)
        CATALOGUE.append(Fault(name, "weights", "", inject, 5))
    name = "a thread writes to a buffer all the time"
    CATALOGUE.append(Fault(name, "weights", _STIRRED, _are_stirred, 20))


_register()
