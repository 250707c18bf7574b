"""A module may be saved as it is, while its calls are watched: nothing of ours is in the way."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from torch import nn

from onnxport import OnnxExport
from onnxport.inputs.observe import Observer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:Attribute .* is an inst")]


class Kept(zoo.Classifier):
    """Keeps modules among its hyperparameters, as pytorch-forecasting's do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.save_hyperparameters()


class Saves(pl.Callback):
    """Saves the whole module in the middle of an epoch."""

    def __init__(self) -> None:
        self.saved: list[bytes] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        file = io.BytesIO()
        torch.save(pl_module.net, file)
        self.saved.append(file.getvalue())


def fit(root: Path, export: OnnxExport | None, **options: Any) -> tuple[list[dict[str, Any]], Any]:
    torch.manual_seed(0)
    saves = Saves()
    given = [] if export is None else [export]
    trainer = zoo.trainer(root, *given, saves, zoo.checkpoints(root, **options), epochs=1)
    trainer.fit(Kept(zoo.cnn()), zoo.loader())
    files = sorted((root / "checkpoints").glob("*.ckpt"))
    return [torch.load(file, weights_only=False) for file in files], saves.saved


def hooks_in(net: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [each for part in net.modules() for kind in kinds for each in vars(part)[kind]]


def test_hyperparameters_may_hold_modules_that_are_watched(tmp_path: Path) -> None:
    export = OnnxExport(core="trace", background=False, mlflow=False)
    every = {"every_n_train_steps": 1}
    found, saved = fit(tmp_path / "with", export, **every)
    plain, _ = fit(tmp_path / "without", None, **every)
    assert len(found) == len(plain) == len(saved) == 3
    assert all(report.ok for report in export.reports)
    for one, other in zip(found, plain, strict=True):
        net, expected = one["hyper_parameters"]["net"], other["hyper_parameters"]["net"]
        assert hooks_in(net) == hooks_in(expected) == []
        assert str(net) == str(expected)
        weights = zip(net.state_dict().values(), expected.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in weights)


def test_a_module_that_is_watched_can_be_saved_and_read_without_us(tmp_path: Path) -> None:
    net = zoo.cnn()
    observer = Observer(net)
    observer.start()
    torch.save(net, tmp_path / "net.pt")
    net(torch.zeros(2, 1, 8, 8))
    observer.stop()
    assert observer.choose() == ""
    reads = (
        "import sys, torch; sys.modules['onnxport'] = None; "
        "net = torch.load(sys.argv[1], weights_only=False); "
        "print(tuple(net(torch.zeros(2, 1, 8, 8)).shape))"
    )
    command = [sys.executable, "-c", reads, str(tmp_path / "net.pt")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == "(2, 3)\n"
