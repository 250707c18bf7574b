"""Fabric with weights that are spread over processes (FSDP2): models are whole."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

import pytest
from processes import together

import onnxport
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
    import json, sys, warnings
    warnings.simplefilter("ignore")
    from pathlib import Path
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy
    from onnxport.callbacks.fabric import OnnxExport

    def parallelize(model, mesh):
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh["data_parallel"])
        return model

    def train(root, export, whole):
        torch.manual_seed(0)
        callback = OnnxExport(core="trace", background=False, mlflow=False, folder=root)
        strategy = ModelParallelStrategy(
            parallelize, data_parallel_size=2, tensor_parallel_size=1,
            save_distributed_checkpoint=not whole,
        )
        callbacks = [callback] if export else []
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, callbacks=callbacks)
        fabric.launch()
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        net = fabric.setup(net)
        optimizer = fabric.setup_optimizers(torch.optim.SGD(net.parameters(), 0.1))
        losses = []
        for step in range(1, 7):
            loss = net(torch.randn(8, 6)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % 3 == 0:
                fabric.save(root / f"step={step}.ckpt", {"model": net, "step": step})
        fabric.call("on_train_end")
        return losses, [(one.ok, one.error, one.path) for one in callback.reports]

    said = {}
    for export in (True, False):
        root = Path(sys.argv[1], str(export))
        root.mkdir(exist_ok=True)
        said[root.name] = train(root, export, sys.argv[2] == "whole")
    rank = torch.distributed.get_rank()
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(said))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_models_of_spread_weights_are_whole(kind: str, tmp_path: Path) -> None:
    together(textwrap.dedent(SCRIPT), tmp_path, 2, str(tmp_path), kind)
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        losses, reports = said["True"]
        assert losses == said["False"][0]
        assert len(reports) == (2 if rank == 0 else 0)
        assert [error for ok, error, _ in reports if not ok] == []
    for step in (3, 6):
        checkpoint = tmp_path / "True" / f"step={step}.ckpt"
        state = read_state_dict(checkpoint, "model")
        noted = read_metadata(checkpoint.with_suffix(".onnx"))["weights_sha256"]
        assert noted == onnxport.weights_sha256(state)
