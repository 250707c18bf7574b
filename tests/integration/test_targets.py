"""What a checkpoint's model is a model of: methods, wrappers, several at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from torch import nn

import onnxport
from onnxport import ConfigurationError, ExportError, Inputs, MLflow, OnnxExport

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Predicts(zoo.Classifier):
    """Has a method for prediction that gets the whole batch and uses the images."""

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        probabilities = self(batch["image"]).softmax(-1)
        return {"probabilities": probabilities, "label": probabilities.argmax(-1)}

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        return self.net[0](image).tanh()

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net[1](self.embed(batch["image"]))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), nn.Linear(5, 3))


class Deployed(nn.Module):
    """Bytes in, probabilities out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels.float() / 16).softmax(-1)


def fit(root: Path, callback: OnnxExport, kind: type[zoo.Classifier] = Predicts) -> zoo.Classifier:
    torch.manual_seed(0)
    module = kind(net())
    saves = zoo.checkpoints(root, filename="{epoch}", save_top_k=-1)
    trainer = zoo.trainer(root, saves, callback, epochs=2)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return module


def run(path: str | None, **feeds: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})


def test_predict_step_comes_out_with_the_images_alone(tmp_path: Path) -> None:
    callback = OnnxExport(target="predict_step")
    module = fit(tmp_path, callback).eval()
    report = callback.reports[-1]
    assert report.ok, report.error
    assert report.target == "predict_step"
    assert [spec.name for spec in report.inputs] == ["image"]
    assert [spec.name for spec in report.outputs] == ["probabilities", "label"]
    assert any("label: not used" in warning for warning in report.warnings)
    images = torch.randn(7, 1, 8, 8)
    probabilities, label = run(report.path, image=images)
    expected = module(images).softmax(-1).detach()
    assert np.allclose(probabilities, expected.numpy(), atol=1e-5)
    assert (label == expected.argmax(-1).numpy()).all()
    names = {value.name for value in onnx.load(str(report.path)).graph.initializer}
    assert set(module.state_dict()) <= names


def test_a_step_that_wants_the_first_part_of_the_batch_gets_it(tmp_path: Path) -> None:
    class Tuples(zoo.Classifier):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return super().training_step({"image": batch[0], "label": batch[1]}, index)

        def predict_step(self, image: torch.Tensor) -> torch.Tensor:
            return self(image).argmax(-1)

    torch.manual_seed(0)
    rows = torch.utils.data.TensorDataset(zoo.Rows().images, zoo.Rows().labels)
    callback = OnnxExport(target="predict_step")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), callback, epochs=1)
    trainer.fit(Tuples(net()), torch.utils.data.DataLoader(rows, batch_size=8))
    assert callback.reports[-1].ok, callback.reports[-1].error
    assert callback.reports[-1].dynamic_axes["image"] == {0: "batch"}


def test_a_method_that_training_calls_is_seen(tmp_path: Path) -> None:
    callback = OnnxExport(target="embed", core="trace")
    module = fit(tmp_path, callback).eval()
    report = callback.reports[-1]
    assert report.ok, report.error
    images = torch.randn(3, 1, 8, 8)
    (embedded,) = run(report.path, image=images)
    assert np.allclose(embedded, module.embed(images).detach().numpy(), atol=1e-5)


def test_a_method_that_nothing_calls_asks_for_an_example(tmp_path: Path) -> None:
    class Unasked(zoo.Classifier):
        def rank(self, image: torch.Tensor) -> torch.Tensor:
            return self(image).argsort(-1)

    silent, given = (
        OnnxExport(target="rank", dirpath=tmp_path / "a"),
        OnnxExport(target="rank", inputs=Inputs(example=torch.randn(4, 1, 8, 8))),
    )
    fit(tmp_path / "one", silent, Unasked)
    assert "give Inputs(example=...)" in silent.reports[-1].error
    fit(tmp_path / "two", given, Unasked)
    assert given.reports[-1].ok, given.reports[-1].error


def test_processing_around_the_model_goes_into_one_argument(tmp_path: Path) -> None:
    pixels = torch.randint(0, 17, (4, 1, 8, 8), dtype=torch.uint8)
    callback = OnnxExport(target=Deployed, inputs=Inputs(example=pixels))
    module = fit(tmp_path, callback).eval()
    report = callback.reports[-1]
    assert report.ok, report.error
    assert report.target == "Deployed"
    assert report.inputs[0].name == "pixels"
    assert report.inputs[0].dtype == "uint8"
    (probabilities,) = run(report.path, pixels=pixels[:3])
    expected = module(pixels[:3].float() / 16).softmax(-1).detach()
    assert np.allclose(probabilities, expected.numpy(), atol=1e-5)
    names = {value.name for value in onnx.load(str(report.path)).graph.initializer}
    assert set(module.state_dict()) <= names


def test_a_function_that_takes_what_forward_takes_needs_no_example(tmp_path: Path) -> None:
    callback = OnnxExport(target=lambda model: lambda image: model(image).softmax(-1), core="trace")
    fit(tmp_path, callback, zoo.Classifier)
    report = callback.reports[-1]
    assert report.ok, report.error
    assert report.dynamic_axes["image"] == {0: "batch"}


def test_several_models_per_checkpoint_are_mirrored_each(tmp_path: Path) -> None:
    targets = {"encoder": "net.0", "head": "net.1", "all": Deployed}
    callback = OnnxExport(target=targets, core="trace")
    module = zoo.Classifier(net())
    saves = zoo.checkpoints(tmp_path, filename="{epoch}", save_top_k=1, monitor="val_loss")
    trainer = zoo.trainer(tmp_path, saves, callback, epochs=3)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    models = {path.name for path in tmp_path.rglob("*.onnx")}
    assert models == {f"{checkpoint.stem}-{name}.onnx" for name in targets}
    folder = checkpoint.parent
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    module.load_state_dict(state)
    images = torch.randn(6, 1, 8, 8)
    (encoded,) = run(str(folder / f"{checkpoint.stem}-encoder.onnx"), input=images)
    (logits,) = run(str(folder / f"{checkpoint.stem}-head.onnx"), input=torch.from_numpy(encoded))
    assert np.allclose(logits, module.eval()(images).detach().numpy(), atol=1e-5)
    assert [report.target for report in callback.reports[:3]] == ["net.0", "net.1", "Deployed"]


def test_several_models_share_a_run_and_have_their_own_names_in_the_registry(
    tmp_path: Path, store: str
) -> None:
    from mlflow import MlflowClient

    mlflow = MLflow(tracking_uri=store, register="pair")
    callback = OnnxExport(target={"encoder": "net.0", "head": "net.1"}, core="trace", mlflow=mlflow)
    fit(tmp_path, callback)
    client = MlflowClient(tracking_uri=store)
    runs = {report.tracking.run_id for report in callback.reports if report.tracking}
    assert len(runs) == 1
    assert client.get_run(runs.pop()).info.status == "FINISHED"
    names = {model.name for model in client.search_registered_models()}
    assert names == {"pair-encoder", "pair-head"}
    for name in names:
        assert client.get_model_version_by_alias(name, "champion")


@pytest.mark.parametrize("target", ["predict_step", Deployed, {"a": "embed", "b": "net.0"}])
def test_training_goes_on_as_without_a_callback(target: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Predicts(net())
    trainer = zoo.trainer(tmp_path / "plain", zoo.checkpoints(tmp_path / "plain"), epochs=2)
    trainer.fit(plain, zoo.loader(), zoo.loader(shuffle=False))
    module = fit(tmp_path / "exporting", OnnxExport(target=target, core="trace"))
    assert module.losses == plain.losses
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert vars(module).keys() == vars(plain).keys()


@pytest.mark.parametrize("target", [3, {}, {"a/b": "net"}, {"a": 4}])
def test_what_is_no_target_is_refused(target: Any) -> None:
    with pytest.raises(ConfigurationError, match="target= "):
        OnnxExport(target=target)


def test_a_name_that_is_not_there_ends_training_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no submodule and no method of Predicts"):
        fit(tmp_path, OnnxExport(target="decoder"))


def test_script_says_that_it_compiles_modules_only(tmp_path: Path) -> None:
    images = torch.randn(4, 1, 8, 8)
    with pytest.raises(ExportError, match="no module that script can compile"):
        onnxport.export(Predicts(net()), images, tmp_path / "a", target="embed", core="script")


def test_export_takes_a_method_and_a_wrapper(tmp_path: Path) -> None:
    module, images = Predicts(net()), torch.randn(4, 1, 8, 8)
    batch = {"image": images, "label": torch.zeros(4)}
    example = onnxport.Example((batch, 0))
    report = onnxport.export(module, example, tmp_path / "a.onnx", target="predict_step")
    assert [spec.name for spec in report.inputs] == ["image"]
    report = onnxport.export(module, images, tmp_path / "b.onnx", target=Deployed)
    assert [spec.name for spec in report.inputs] == ["pixels"]
    assert report.ok


def test_several_targets_are_watched_apart_while_the_first_models_are_made(tmp_path: Path) -> None:
    targets = {"body": "net.0", "head": "net.1", "served": "predict_step"}
    scripted = OnnxExport(target=targets, core="torchscript")
    traced = OnnxExport(core="script", dirpath=tmp_path / "other")
    saves = zoo.checkpoints(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = zoo.trainer(tmp_path, saves, scripted, traced, epochs=1)
    torch.manual_seed(0)
    trainer.fit(Predicts(net()), zoo.loader())
    assert [report.ok for report in scripted.reports] == [True] * 9
    assert {report.core for report in traced.reports} == {None}  # its forward is never called
    assert all(report.dynamic_axes for report in scripted.reports)
