"""Whoever writes the checkpoints, and whenever: each of them gets its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import zoo
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from typing_extensions import override

import onnxport
from onnxport import OnnxExport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Renaming(TorchCheckpointIO):
    """Writes in a format of its own."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        content = {"weights": checkpoint["state_dict"], "epoch": checkpoint["epoch"]}
        super().save_checkpoint(content, path)


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=False)
    return content.get("state_dict") or content["weights"]


PLUGINS: dict[str, Callable[[], Any]] = {
    "plain": TorchCheckpointIO,
    "async": AsyncCheckpointIO,
    "of the user": Renaming,
    "of the user, async": lambda: AsyncCheckpointIO(Renaming()),
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("plugin", list(PLUGINS))
def test_each_checkpoint_has_its_model(plugin: str, background: bool, tmp_path: Path) -> None:
    callback = OnnxExport(core="trace", background=background)
    saves = zoo.checkpoints(tmp_path, save_top_k=2, monitor="val_loss", save_last="link")
    steps = zoo.checkpoints(
        tmp_path, save_top_k=-1, every_n_train_steps=2, filename="step-{step}", monitor=None
    )
    trainer = zoo.trainer(tmp_path, saves, steps, callback, epochs=3, plugins=[PLUGINS[plugin]()])
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(), zoo.loader(shuffle=False))
    assert [report.error for report in callback.reports if not report.ok] == []
    folder = tmp_path / "checkpoints"
    checkpoints = {path.stem for path in folder.glob("*.ckpt")}
    assert {path.stem for path in folder.glob("*.onnx")} == checkpoints
    assert len(checkpoints) >= 6
    for model in folder.glob("*.onnx"):
        state = weights(model.with_suffix(".ckpt"))
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
