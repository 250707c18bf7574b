"""A training framework of a hundred lines, for which a newcomer has written an adapter."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

__all__ = ["Plugin", "Runner"]


class Plugin:
    """What somebody else does meanwhile; every method may be overridden."""

    def opened(self, runner: Runner) -> None:
        """Training begins."""

    def before_step(self, runner: Runner, batch: Any) -> None:
        """A step begins."""

    def before_write(self, runner: Runner, file: Path) -> None:
        """A checkpoint is about to be written."""

    def after_write(self, runner: Runner, file: Path, content: dict[str, Any]) -> None:
        """A checkpoint was written."""

    def before_delete(self, runner: Runner, file: Path) -> None:
        """A checkpoint is about to be deleted."""

    def after_delete(self, runner: Runner, file: Path) -> None:
        """A checkpoint was deleted."""

    def closed(self, runner: Runner, error: BaseException | None) -> None:
        """Training is over, perhaps by an error, which is raised afterwards."""


class Runner:
    """Trains a module.

    Args:
        module: The module.
        folder: For checkpoints.
        every: Steps from one checkpoint to the next; 0: there are none.
        keep: How many checkpoints stay.
        plugins: Are told what happens, in order.
    """

    def __init__(
        self, module: nn.Module, folder: Path, *, every: int, keep: int, plugins: Iterable[Plugin]
    ) -> None:
        self.module, self.folder, self.every, self.keep = module, folder, every, keep
        self.plugins = tuple(plugins)
        self.step, self.written = 0, deque[Path]()
        self.scores: dict[str, float] = {}

    def tell(self, name: str, *given: Any) -> None:
        for plugin in self.plugins:
            getattr(plugin, name)(self, *given)

    def run(
        self, loader: Iterable[Any], loss_of: Callable[[nn.Module, Any], torch.Tensor]
    ) -> list[float]:
        """Train once through the loader; return the losses."""
        optimizer = torch.optim.SGD(self.module.parameters(), 0.1)
        losses = []
        self.module.train()
        self.tell("opened")
        try:
            for batch in loader:
                self.tell("before_step", batch)
                loss = loss_of(self.module, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                self.step += 1
                losses.append(loss.item())
                self.scores["loss"] = losses[-1]
                if self.every and self.step % self.every == 0:
                    self.write()
        except BaseException as error:
            self.tell("closed", error)
            raise
        self.tell("closed", None)
        return losses

    def write(self) -> None:
        """Write a checkpoint, and delete the oldest if there are too many; in the first process."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return
        file = Path(self.folder, f"state-{self.step}.pth")
        content = {"network": self.module.state_dict(), "step": self.step, "scores": self.scores}
        self.tell("before_write", file)
        torch.save(content, file)
        self.tell("after_write", file, content)
        self.written.append(file)
        if len(self.written) > self.keep:
            oldest = self.written.popleft()
            self.tell("before_delete", oldest)
            oldest.unlink()
            self.tell("after_delete", oldest)
