"""Weights past 2 GB, which no ONNX file can hold by itself, through the whole path."""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from processes import TESTS, started

import onnxport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.worker]

LIMIT_BYTES = 10 * 10**9
"""Of the trainer and all that works for it. A checkpoint alone takes the weights twice."""

SCRIPT = f"""
    import json, sys, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, {TESTS!r})
    import torch, zoo
    from pathlib import Path
    from torch import nn
    from onnxport import OnnxExport

    class Wide(nn.Module):
        "Few layers, two of them of more than a gigabyte."
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16384)
            self.wide = nn.Linear(16384, 16384)
            self.wider = nn.Linear(16384, 16640)
            self.last = nn.Linear(16640, 3)
            self.wide.requires_grad_(False)
            self.wider.requires_grad_(False)

        def forward(self, image):
            hidden = self.wide(self.first(image.flatten(1)).relu()).relu()
            return self.last(self.wider(hidden).relu())

    class Trained(zoo.Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    root, core = Path(sys.argv[1]), sys.argv[2]
    export = OnnxExport(core=core)
    saves = zoo.checkpoints(root, save_top_k=1, filename="{{epoch}}")
    trainer = zoo.trainer(root, saves, export, epochs=2, limit_train_batches=3)
    trainer.fit(Trained(Wide()), zoo.loader())
    said = [json.loads(report.to_json()) for report in export.reports]
    (root / "said.json").write_text(json.dumps(said))
    torch.manual_seed(1)
    rows = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.save((rows, trainer.lightning_module.eval()(rows)), root / "rows.pt")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # several gigabytes


@pytest.mark.exhaustive
@pytest.mark.parametrize("core", ["auto", "trace"])
def test_more_than_two_gigabytes(core: str, folder: Path) -> None:
    most = 0
    with started(
        textwrap.dedent(SCRIPT), folder, 1, str(folder), core, environment=lambda _: {}
    ) as family:
        while family.ranks[0].poll() is None:
            most = max(most, family.memory())
            time.sleep(0.1)
        assert family.wait() == [0], family.said
    reports = json.loads((folder / "said.json").read_text())
    assert [report["error"] for report in reports if not report["ok"]] == []
    (model,) = folder.rglob("*.onnx")
    (checkpoint,) = folder.rglob("*.ckpt")
    assert model.stem == checkpoint.stem
    onnx.checker.check_model(model)
    state = torch.load(checkpoint, mmap=True, weights_only=False)["state_dict"]
    assert sum(tensor.nbytes for tensor in state.values()) > 2**31
    assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
    rows, expected = torch.load(folder / "rows.pt")
    (found,) = onnxruntime.InferenceSession(model).run(None, {"image": rows.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    assert most < LIMIT_BYTES
