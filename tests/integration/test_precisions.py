"""Each precision that Lightning trains in becomes a model that ONNX Runtime runs on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest
import torch
import zoo
from torch import nn
from typing_extensions import override

import onnxport
from onnxport import OnnxExport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

PRECISIONS = {
    "32-true": "float32",
    "16-mixed": "float32",  # bfloat16 on the CPU, by Lightning
    "bf16-mixed": "float32",
    "16-true": "float16",
    "bf16-true": "float32",  # ONNX Runtime has no bfloat16 for the CPU; its numbers are float32's
    "64-true": "float64",
}


class Plain(zoo.Classifier):
    """Trained by SGD: Adam's epsilon is nothing in float16."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("core", ["trace", "dynamo"])
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_each_precision_runs_and_says_what_it_is(precision: str, core: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    callback = OnnxExport(core=core)
    trainer = zoo.trainer(
        tmp_path, zoo.checkpoints(tmp_path), callback, epochs=1, precision=precision
    )
    trainer.fit(Plain(net), zoo.loader())
    report = callback.reports[-1]
    assert report.error is None
    dtype = PRECISIONS[precision]
    assert [spec.dtype for spec in (*report.inputs, *report.outputs)] == [dtype] * 2
    (model,) = (tmp_path / "checkpoints").glob("*.onnx")
    state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
    assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
    rows = np.random.default_rng(0).standard_normal((7, 1, 8, 8)).astype(dtype)
    (made,) = ort.InferenceSession(str(model)).run(None, {report.inputs[0].name: rows})
    exact = {name.removeprefix("net."): tensor.double() for name, tensor in state.items()}
    with torch.no_grad():
        expected = net.double()
        expected.load_state_dict(exact)
        wanted = expected(torch.from_numpy(rows).double()).numpy()
    # What the type can hold, for sums of 64 products.
    limit = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(made.astype("float64"), wanted, rtol=limit, atol=limit)
    said = any("bfloat16" in warning for warning in report.warnings)
    assert said == (precision == "bf16-true")


def test_weights_that_compute_no_number_are_said(tmp_path: Path) -> None:
    class Broken(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                with torch.no_grad():
                    self.net[1].weight.fill_(float("nan"))

    callback = OnnxExport(core="trace", background=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    saves = zoo.checkpoints(tmp_path, save_top_k=-1)
    trainer = zoo.trainer(tmp_path, saves, callback, epochs=3)
    trainer.fit(Broken(net), zoo.loader())
    assert [report.ok for report in callback.reports] == [True] * 3
    said = [
        any("NaN or infinite" in text for text in report.warnings) for report in callback.reports
    ]
    assert said == [False, False, True]
    path = tmp_path / "broken.onnx"
    report = onnxport.export(net, torch.randn(3, 1, 8, 8), path, core="trace")
    assert any("NaN or infinite" in warning for warning in report.warnings)
