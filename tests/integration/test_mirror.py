"""Models beside checkpoints: the same set, the same weights, through every way of saving."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from onnxport import ExportReport, OnnxExport, weights_sha256
from onnxport.callbacks.paths import model_path

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import LightningModule

pytestmark = pytest.mark.integration


def stems(folder: Path, suffix: str) -> set[str]:
    return {path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")}


def assert_holds_checkpoint(checkpoint: Path, module: LightningModule) -> None:
    """Compare a model with its checkpoint: the hash, the weights it holds, and what it computes."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    path = model_path(checkpoint)
    proto = onnx.load(path)
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    assert metadata["onnxport.weights_sha256"] == weights_sha256(content)
    assert metadata["onnxport.checkpoint"] == checkpoint.name
    assert_graph_outputs_are_the_weights(proto, content)
    fresh = type(module)(module.net)
    fresh.load_state_dict(content)
    image = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = fresh.eval()(image)
    actual = ort.InferenceSession(path).run(None, {"image": image.numpy()})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def assert_graph_outputs_are_the_weights(
    proto: onnx.ModelProto, content: dict[str, torch.Tensor]
) -> None:
    """Let ONNX Runtime itself return the graph's weights, by making outputs of them."""
    names = [init.name for init in proto.graph.initializer if init.name in content]
    assert len(names) >= 2, [init.name for init in proto.graph.initializer]
    read = onnx.ModelProto()
    read.CopyFrom(proto)
    del read.graph.output[:]
    for init in read.graph.initializer:
        if init.name in names:
            read.graph.node.add(op_type="Identity", input=[init.name], output=[f"read/{init.name}"])
            read.graph.output.append(
                onnx.helper.make_tensor_value_info(f"read/{init.name}", init.data_type, init.dims)
            )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(read.SerializeToString(), options)
    feeds = {node.name: np.zeros((1, 1, 8, 8), np.float32) for node in session.get_inputs()}
    returned = session.run(None, feeds)
    for output, value in zip(session.get_outputs(), returned, strict=True):
        np.testing.assert_array_equal(value, content[output.name.removeprefix("read/")].numpy())


class ManualSave(Callback):
    """Saves by hand in the middle of an epoch."""

    def __init__(self, path: Path, *, weights_only: bool = False) -> None:
        self.path, self.weights_only = path, weights_only

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


def plain_net() -> torch.nn.Module:
    """Without BatchNorm, which an optimised graph folds into other weights."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)
    )


@pytest.mark.parametrize("core", ["dynamo", "trace", "script"])
def test_every_model_holds_its_checkpoints_weights(core: str, tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core=core)
    zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), export).fit(module, zoo.loader())
    found = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert len(found) == 2
    for checkpoint in found:
        assert_holds_checkpoint(checkpoint, module)


@pytest.mark.parametrize(
    "options",
    [
        {"save_top_k": 2, "monitor": "val_loss"},
        {"save_top_k": 1, "monitor": "val_acc", "mode": "max", "save_last": True},
        {"save_top_k": 1, "save_weights_only": True},
        {"save_top_k": 2, "monitor": "val_loss", "filename": "größe {epoch}-{val_loss:.2f} über=1"},
        {"save_top_k": -1, "every_n_train_steps": 2},
    ],
    ids=["top-k", "best and last", "weights only", "odd names", "every two steps"],
)
def test_the_set_of_models_equals_the_set_of_checkpoints(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core="trace")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path, **options), export, epochs=4)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    assert [report.error for report in export.reports if not report.ok] == []
    assert len(export.reports) >= len(stems(folder, ".ckpt")) > 0
    assert stems(folder, ".onnx") == stems(folder, ".ckpt")
    assert stems(folder, ".onnx.json") == stems(folder, ".ckpt")
    assert list(folder.glob(".onnxport-*")) == []
    for checkpoint in folder.glob("*.ckpt"):
        assert_holds_checkpoint(checkpoint, module)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_saved_by_hand_gets_a_model(weights_only: bool, tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    manual = ManualSave(tmp_path / "by hand.ckpt", weights_only=weights_only)
    trainer = zoo.trainer(tmp_path, manual, OnnxExport(core="trace"), enable_checkpointing=False)
    trainer.fit(module, zoo.loader())
    assert_holds_checkpoint(tmp_path / "by hand.ckpt", module)
    trainer.save_checkpoint(tmp_path / "after fit.ckpt")
    assert_holds_checkpoint(tmp_path / "after fit.ckpt", module)


def test_averaged_weights_are_the_ones_exported(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    average = EMAWeightAveraging(decay=0.5)
    export = OnnxExport(core="trace")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), average, export)
    trainer.fit(module, zoo.loader())
    for checkpoint in (tmp_path / "checkpoints").glob("*.ckpt"):
        content = torch.load(checkpoint, weights_only=False)
        raw = content["current_model_state"]
        name = "net.3.weight"
        assert not torch.equal(raw[name], content["state_dict"][name])
        assert_holds_checkpoint(checkpoint, module)


def test_a_checkpoint_that_is_overwritten_gets_a_new_model(tmp_path: Path) -> None:
    module = zoo.Classifier(plain_net())
    export = OnnxExport(core="trace")
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True)
    zoo.trainer(tmp_path, saves, export, epochs=3).fit(module, zoo.loader())
    last = [r for r in export.reports if r.checkpoint.endswith("last.ckpt")]
    assert len({report.weights_sha256 for report in last}) == 3
    assert_holds_checkpoint(tmp_path / "checkpoints" / "last.ckpt", module)


def test_a_model_of_older_weights_is_removed_when_the_new_export_fails(tmp_path: Path) -> None:
    class BreaksLater(zoo.Classifier):
        broken = False

        def on_train_epoch_start(self) -> None:
            self.broken = self.current_epoch > 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            shift = json.loads(json.dumps(image.mean().item())) if self.broken else 0.0
            return super().forward(image) + shift

    module = BreaksLater(plain_net())
    export = OnnxExport(core="trace")
    saves = zoo.checkpoints(tmp_path, save_top_k=1, save_last=True)
    zoo.trainer(tmp_path, saves, export).fit(module, zoo.loader())
    last = [r.ok for r in export.reports if r.checkpoint.endswith("last.ckpt")]
    assert last == [True, False]
    assert stems(tmp_path / "checkpoints", ".onnx") == set()


def test_a_file_of_the_users_is_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    class Claims(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            (folder / f"epoch={trainer.current_epoch}.onnx").write_text("mine")

    saves = zoo.checkpoints(tmp_path, save_top_k=1, filename="{epoch}")
    trainer = zoo.trainer(tmp_path, saves, Claims(), OnnxExport(when="end", core="trace"), epochs=3)
    trainer.fit(zoo.Classifier(plain_net()), zoo.loader())
    assert (folder / "epoch=0.onnx").read_text() == "mine"
    assert (folder / "epoch=1.onnx").read_text() == "mine"


def test_dirpath_collects_the_models_elsewhere(tmp_path: Path) -> None:
    export = OnnxExport(core="trace", dirpath=tmp_path / "models")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), export)
    trainer.fit(zoo.Classifier(plain_net()), zoo.loader())
    assert stems(tmp_path / "models", ".onnx") == stems(tmp_path / "checkpoints", ".ckpt")
    assert stems(tmp_path / "checkpoints", ".onnx") == set()


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    export = OnnxExport(core="trace")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path, monitor="val_loss"), export, epochs=1)
    trainer.fit(zoo.Classifier(plain_net()), zoo.loader(), zoo.loader(shuffle=False))
    (report,) = export.reports
    proto = onnx.load(report.path)
    said = {p.key.removeprefix("onnxport."): p.value for p in proto.metadata_props}
    assert said["epoch"] == "0"
    assert said["global_step"] == "3"
    assert said["core"] == "trace"
    assert said["dynamic_axes"] == '{"image": {"0": "batch"}, "output": {"0": "batch"}}'
    assert {"torch", "onnx", "onnxruntime", "version", "error_budget", "metrics"} <= said.keys()
    beside = ExportReport.from_json(
        model_path(report.checkpoint).with_suffix(".onnx.json").read_text()
    )
    assert beside.weights_sha256 == report.weights_sha256 == said["weights_sha256"]
    assert beside.checks == report.checks
    assert beside.metrics.keys() == {"val_acc", "val_loss"}
    assert report.evidence[0].dim == "batch"
    assert proto.graph.initializer[0].name.startswith("net.")


def test_the_hash_is_of_names_dtypes_shapes_and_bytes() -> None:
    state = {"b": torch.zeros(2), "a": torch.ones(1, 2, dtype=torch.int64)}
    expected = hashlib.sha256()
    for name in ("a", "b"):
        tensor = state[name]
        expected.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        expected.update(tensor.numpy().tobytes())
    assert weights_sha256(state) == expected.hexdigest()
