"""Weights that are spread over processes (FSDP2, tensor parallelism): models are whole."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import onnxport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.worker]

SCRIPT = """
    import json, os, sys, warnings
    warnings.simplefilter("ignore")
    from pathlib import Path
    import lightning.pytorch as pl, torch
    from torch import nn
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, RowwiseParallel, parallelize_module,
    )
    from torch.distributed.tensor import Replicate
    from onnxport import OnnxExport

    root, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    data, tensor = options["data"], options["tensor"]

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
            self.norm, self.scale = nn.LayerNorm(32), 2.0
            self.register_buffer("offset", torch.ones(4))

        def configure_model(self):
            if tensor > 1:
                plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
                if options["norm"]:
                    plan = {"second": ColwiseParallel(output_layouts=Replicate())}
                parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
            if data > 1:
                for layer in (self.first, self.second, self):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def forward(self, features):
            hidden = self.first(features).relu()
            hidden = self.norm(hidden) if options["norm"] else hidden
            return self.second(hidden) * self.scale + self.offset

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    losses = []
    torch.manual_seed(1)
    rows = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(0, 4, (64,)))
    saves = ModelCheckpoint(root / "c", save_top_k=1, monitor="loss", save_last=options["last"])
    export = OnnxExport(core="trace", on_error=options["on_error"])
    trainer = pl.Trainer(
        accelerator="cpu", devices=data * tensor, max_epochs=3, logger=False,
        strategy=ModelParallelStrategy(
            data_parallel_size=data, tensor_parallel_size=tensor,
            save_distributed_checkpoint=options["distributed"],
        ),
        default_root_dir=root, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saves, *([export] if options["export"] else [])],
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(rows, 8))
    rank = trainer.global_rank
    said = {"losses": losses, "reports": [json.loads(r.to_json()) for r in export.reports]}
    (root / f"rank{rank}.json").write_text(json.dumps(said))
"""


def run(root: Path, **options: Any) -> list[dict[str, Any]]:
    root.mkdir()
    script = root / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    chosen = {
        "data": 2,
        "tensor": 1,
        "distributed": True,
        "export": True,
        "norm": True,
        "last": True,
        "on_error": "warn",
    } | options
    result = subprocess.run(
        [sys.executable, str(script), str(root), json.dumps(chosen)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    files = [root / f"rank{rank}.json" for rank in range(chosen["data"] * chosen["tensor"])]
    assert all(file.exists() for file in files), result.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


def state_of(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    if checkpoint.is_dir():
        whole = folder / f"{checkpoint.stem}.pt"
        dcp_to_torch_save(checkpoint, whole)
        checkpoint = whole
    return torch.load(checkpoint, weights_only=False)["state_dict"]


CASES = {
    "fsdp, distributed": {},
    "fsdp, full": {"distributed": False},
    "tensor parallel, distributed": {"data": 1, "tensor": 2, "norm": False},
    "tensor parallel, full": {"data": 1, "tensor": 2, "distributed": False, "norm": True},
    "both": {"data": 2, "tensor": 2, "norm": False},
}


@pytest.mark.parametrize("case", list(CASES))
def test_models_are_whole_and_training_is_what_it_was(case: str, tmp_path: Path) -> None:
    ranks = run(tmp_path / "with", **CASES[case])
    plain = run(tmp_path / "without", export=False, **CASES[case])
    assert [rank["losses"] for rank in ranks] == [rank["losses"] for rank in plain]
    assert all(rank["reports"] == [] for rank in ranks[1:])
    assert [report["error"] for report in ranks[0]["reports"] if not report["ok"]] == []
    folder = tmp_path / "with" / "c"
    checkpoints = {path.stem: path for path in folder.glob("*.ckpt")}
    models = {path.stem: path for path in folder.glob("*.onnx")}
    assert set(models) == set(checkpoints)
    assert "last" in models
    for stem, model in models.items():
        state = state_of(checkpoints[stem], tmp_path)
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
    for report in ranks[0]["reports"]:
        assert report["dynamic_axes"]["features"] == {"0": "batch"}
