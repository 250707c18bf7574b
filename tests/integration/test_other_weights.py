"""Where a checkpoint holds other weights than the module in training, the model holds those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from typing_extensions import override

import onnxport
from onnxport import OnnxExport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.pytorch.callbacks import Callback

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


class Halves(zoo.Classifier):
    """Writes other weights to its checkpoints."""

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor * 0.5 for name, tensor in state.items()}


CASES: dict[str, tuple[Callable[[], zoo.Classifier], Callable[[], list[Callback]]]] = {
    "ema": (lambda: zoo.Classifier(net()), lambda: [EMAWeightAveraging(decay=0.5)]),
    "average": (lambda: zoo.Classifier(net()), lambda: [WeightAveraging()]),
    "swa": (
        lambda: zoo.Classifier(net()),
        lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    ),
    "pruned": (
        lambda: zoo.Classifier(net()),
        lambda: [ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False)],
    ),
    "edited": (lambda: Halves(net()), list),
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("case", list(CASES))
def test_the_model_holds_the_checkpoints_weights(
    case: str, background: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, others = CASES[case]
    callback = OnnxExport(core="trace", background=background)
    saves = zoo.checkpoints(tmp_path, save_top_k=-1)
    trainer = zoo.trainer(tmp_path, saves, callback, *others(), epochs=4)
    trainer.fit(module(), zoo.loader())
    assert [report.error for report in callback.reports if not report.ok] == []
    models = sorted((tmp_path / "checkpoints").glob("*.onnx"))
    assert len(models) == 4
    for model in models:
        state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
