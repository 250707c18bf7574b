"""A cluster's warning makes the trainer save at any moment, also while a model is made."""

from __future__ import annotations

import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from lightning.pytorch import plugins
from torch import nn

import onnxport
from onnxport import OnnxExport
from onnxport.callbacks.session import ExportSession, Saved
from onnxport.callbacks.turns import Turns
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    import lightning.pytorch as pl

pytestmark = pytest.mark.slow


class Warned(nn.Module):
    """Its ``forward`` is interrupted once, in the middle of the first model."""

    comes = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.cnn()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if Warned.comes and not self.training:
            Warned.comes = False
            signal.raise_signal(signal.SIGUSR1)
        return self.inner(image)


class Checkpointed(zoo.Classifier):
    """Is warned while its first checkpoint becomes a model."""

    saves = 0

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        first = not self.saves
        self.saves += 1
        Warned.comes = Warned.comes or first


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def train(root: Path, callback: OnnxExport | None) -> tuple[pl.Trainer, list[float]]:
    trainer = zoo.trainer(root, zoo.checkpoints(root), *([callback] if callback else []))
    signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint(root / "warned.ckpt"))
    torch.manual_seed(0)
    module = Checkpointed(Warned())
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return trainer, module.losses


@pytest.mark.worker
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("target", [None, {"a": "net", "b": "net"}])
def test_a_save_in_the_middle_of_a_model(
    background: bool, target: dict[str, str] | None, tmp_path: Path
) -> None:
    callback = OnnxExport(core="trace", background=background, target=target)
    _, losses = train(tmp_path, callback)
    assert [report.error for report in callback.reports if not report.ok] == []
    models = {path.name for path in tmp_path.rglob("warned*.onnx")}
    assert models == ({"warned-a.onnx", "warned-b.onnx"} if target else {"warned.onnx"})
    if target is None:
        for model in tmp_path.rglob("*.onnx"):
            state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
            assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
    assert losses == train(tmp_path / "plain", None)[1]


class TorchCheckpointIO(plugins.TorchCheckpointIO):
    """Lightning's own; Ctrl-C comes when a checkpoint was overwritten and nobody knows yet."""

    saves = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.saves += str(path).endswith("last.ckpt")
        if self.saves == SECOND:
            raise KeyboardInterrupt


SECOND = 2


@pytest.mark.worker
@pytest.mark.parametrize("where", ["before we know", "in our own code"])
@pytest.mark.parametrize("background", [True, False])
def test_ctrl_c_between_a_checkpoint_and_its_model(
    where: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 0
    saved = ExportSession.saved

    def interrupted(self: ExportSession, one: Saved, **options: Any) -> None:
        nonlocal last
        last += one.path.name == "last.onnx"
        if last == SECOND:
            last += 1  # once
            raise KeyboardInterrupt
        saved(self, one, **options)

    plugin = [TorchCheckpointIO()] if where == "before we know" else None
    if plugin is None:
        monkeypatch.setattr(ExportSession, "saved", interrupted)
    before = signal.getsignal(signal.SIGINT)
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True, monitor="val_loss")
    export = OnnxExport(core="trace", background=background)
    trainer = zoo.trainer(tmp_path, saves, export, epochs=9, plugins=plugin)
    with pytest.raises(SystemExit):
        trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert [report.error for report in export.reports if not report.ok] == []
    models = sorted(path.stem for path in tmp_path.rglob("*.onnx"))
    assert models == sorted(path.stem for path in tmp_path.rglob("*.ckpt"))
    for model in tmp_path.rglob("*.onnx"):
        state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)


def test_ctrl_c_while_a_checkpoint_is_saved_of_which_no_model_is_wanted(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True, monitor="val_loss")
    export = OnnxExport(core="trace", when="end")
    trainer = zoo.trainer(tmp_path, saves, export, epochs=9, plugins=[TorchCheckpointIO()])
    with pytest.raises(SystemExit):
        trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    signal.signal(signal.SIGINT, before)
    assert list(tmp_path.rglob("last.ckpt"))
    assert export.reports == []
    assert not list(tmp_path.rglob("*.onnx"))


def test_what_interrupts_work_comes_after_it() -> None:
    turns, said = Turns(), list[str]()

    def work() -> None:
        said.append("begun")
        turns.take(lambda: said.append("interrupting"))
        said.append("done")

    turns.take(work)
    assert said == ["begun", "done", "interrupting"]


def test_a_signal_may_come_between_any_two_lines() -> None:
    """Each line of ``take`` is interrupted once; nothing is lost, done twice, or raised."""
    for line in range(40):
        turns, said, left = Turns(), list[str](), [line]

        def interrupt(frame: FrameType, event: str, _: object, state: Any = None) -> Any:
            turns, said, left = state
            if frame.f_code is not Turns.take.__code__ or event not in {"call", "line"}:
                return None
            left[0] -= 1
            if left[0] == -1:
                sys.settrace(None)
                turns.take(lambda: said.append("interrupting"))
            return partial(interrupt, state=state)

        before = sys.gettrace()
        sys.settrace(partial(interrupt, state=(turns, said, left)))
        try:
            turns.take(lambda said=said: said.append("done"))
        finally:
            sys.settrace(before)
        interrupted = left[0] < 0
        assert sorted(said) == (["done", "interrupting"] if interrupted else ["done"])
    assert not interrupted  # all lines were reached


def test_work_that_is_broken_off_leaves_the_next_its_turn() -> None:
    turns, said = Turns(), list[str]()

    def work() -> None:
        turns.take(lambda: said.append("interrupting"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.take(work)
    turns.take(lambda: said.append("next"))
    assert said == ["interrupting", "next"]
