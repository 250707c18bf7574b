"""accelerate: what is special about its checkpoints, its trackers and its precision."""

from __future__ import annotations

import gc
import shutil
import weakref
from typing import TYPE_CHECKING, Any

import mlflow
import onnxruntime
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn

import onnxport
from onnxport import Background
from onnxport.callbacks.accelerate import OnnxExport
from onnxport.errors import ConfigurationError, ExportError
from onnxport.exporter.checkpoint_file import read_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"core": "trace", "background": False, "mlflow": False, "console": False}


@pytest.fixture(autouse=True)
def _first_of_its_process() -> Iterator[None]:
    """Accelerate keeps what its first user in a process has chosen."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Tied(nn.Module):
    """Predicts a word with the embedding of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.words(ids)).relu())


def accelerator(root: Path, limit: int | None = None, **options: Any) -> Accelerator:
    places = ProjectConfiguration(str(root), automatic_checkpoint_naming=True, total_limit=limit)
    return Accelerator(cpu=True, project_config=places, **options)


def batch() -> torch.Tensor:
    return torch.randint(0, 11, (5, 3))


def step(runner: Accelerator, net: nn.Module, optimizer: Any, x: torch.Tensor) -> None:
    with runner.accumulate(net):
        runner.backward(net(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def train(runner: Accelerator, export: OnnxExport, net: nn.Module, saves: int = 3) -> nn.Module:
    net, optimizer = runner.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    export.attach(runner)
    for number in range(saves):
        for _ in range(4):
            step(runner, net, optimizer, batch())
        runner.log({"val_loss": abs(number - 1) + 1.0, "note": "words"})
        runner.save_state()
    runner.end_training()
    return net


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*.onnx")}


def test_checkpoints_of_tied_weights_and_the_best_of_them(tmp_path: Path) -> None:
    export = OnnxExport(monitor="val_loss", when="end", **QUICK)
    net = train(accelerator(tmp_path), export, Tied())
    (report,) = export.reports
    assert report.ok, report.error
    assert names(tmp_path) == {"checkpoints/checkpoint_1/model.onnx"}  # the best, not the last
    assert report.metrics == {"val_loss": 1.0}
    assert report.global_step == 8
    saved = read_state_dict(tmp_path / "checkpoints" / "checkpoint_1" / "model.safetensors")
    assert len(saved) < len(net.state_dict())  # the file has tied weights once
    found = onnxruntime.InferenceSession(report.path).run(None, {"ids": batch()[:2].numpy()})
    assert found[0].shape == (2, 3, 11)


def test_models_go_with_their_checkpoints(tmp_path: Path) -> None:
    runner, export = accelerator(tmp_path, limit=2), OnnxExport(**QUICK)
    net, optimizer = runner.prepare(Tied(), torch.optim.SGD(Tied().parameters(), 0.1))
    export.attach(runner)
    for _ in range(3):
        step(runner, net, optimizer, batch())
        runner.save_state()
    kept = {f"checkpoints/checkpoint_{number}/model.onnx" for number in (1, 2)}
    assert names(tmp_path) == kept
    (tmp_path / "elsewhere").mkdir()
    runner.project_configuration.automatic_checkpoint_naming = False
    runner.save_state(str(tmp_path / "elsewhere"), safe_serialization=False)
    assert names(tmp_path) == {*kept, "elsewhere/pytorch_model.onnx"}
    shutil.rmtree(tmp_path / "elsewhere")
    runner.end_training()
    assert names(tmp_path) == kept
    assert len(export.reports) == 4
    runner.project_configuration.automatic_checkpoint_naming = False
    runner.save_state(str(tmp_path / "checkpoints" / "checkpoint_2"))  # training is over
    assert len(export.reports) == 4
    assert names(tmp_path) == kept


def test_half_precision_and_steps_that_are_put_together(tmp_path: Path) -> None:
    runner = accelerator(tmp_path, mixed_precision="bf16", gradient_accumulation_steps=2)
    export = OnnxExport(**QUICK)
    train(runner, export, Tied(), saves=2)
    assert [report.error for report in export.reports] == [None, None]
    assert [report.global_step for report in export.reports] == [2, 4]
    assert export.reports[-1].outputs[0].dtype == "float32"
    state = read_state_dict(tmp_path / "checkpoints" / "checkpoint_1" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_one_of_two_modules(tmp_path: Path) -> None:
    runner = accelerator(tmp_path)
    critic, net = runner.prepare(nn.Linear(11, 1), Tied())
    with pytest.raises(ConfigurationError, match="Which module"):
        OnnxExport(**QUICK).attach(runner)
    with pytest.raises(ConfigurationError, match="Which module"):
        OnnxExport(**QUICK).attach(runner, nn.Linear(1, 1))
    export = OnnxExport(**QUICK).attach(runner, net)
    critic(net(batch()))
    runner.save_state()
    assert names(tmp_path) == {"checkpoints/checkpoint_0/model_1.onnx"}
    (report,) = export.reports
    saved = read_state_dict(tmp_path / "checkpoints" / "checkpoint_0" / "model_1.safetensors")
    assert saved.keys() <= net.state_dict().keys()
    assert report.weights_sha256 == onnxport.weights_sha256(net.state_dict())
    runner.end_training()


def test_the_run_of_its_own_tracker(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    files = str(tmp_path / "artifacts")
    runner = accelerator(tmp_path, log_with="mlflow")
    place = {"mlflow": {"logging_dir": files, "run_name": "words"}}
    runner.init_trackers("accelerated", init_kwargs=place)
    export = OnnxExport(monitor="val_loss", register="words", **QUICK | {"mlflow": "auto"})
    train(runner, export, Tied())
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("accelerated").experiment_id])
    assert run.info.run_name == "words"
    assert run.info.status == "FINISHED"
    assert [report.tracking.run_id for report in export.reports] == [run.info.run_id] * 3
    version = client.get_model_version_by_alias("words", "champion")
    assert int(version.version) == 2


def test_an_export_that_fails_can_end_training(tmp_path: Path) -> None:
    class Fails(Tied):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("not in eval mode (injected)")
            return super().forward(ids)

    with pytest.raises(ExportError, match="not in eval mode"):
        train(accelerator(tmp_path), OnnxExport(on_error="raise", **QUICK), Fails())


def test_weights_in_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = accelerator(tmp_path)
    monkeypatch.setattr(runner.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigurationError, match="part of the weights"):
        OnnxExport(**QUICK).attach(runner)


def test_what_a_hook_saves_elsewhere_is_a_checkpoint_all_the_same(tmp_path: Path) -> None:
    runner, export = accelerator(tmp_path), OnnxExport(**QUICK)

    def elsewhere(_: Any, weights: list[Any], folder: str) -> None:
        torch.save(weights.pop(), f"{folder}/unet.pt")

    runner.register_save_state_pre_hook(elsewhere)
    train(runner, export, Tied())
    assert len(names(tmp_path)) == 3


def test_a_file_of_another_format_is_another_checkpoint(tmp_path: Path) -> None:
    runner, export = Accelerator(cpu=True), OnnxExport(**QUICK)
    net, optimizer = runner.prepare(Tied(), torch.optim.SGD(Tied().parameters(), 0.1))
    export.attach(runner)
    for safe in (False, True):
        step(runner, net, optimizer, batch())
        runner.save_state(str(tmp_path), safe_serialization=safe)
    assert names(tmp_path) == {"model.onnx", "pytorch_model.onnx"}
    assert not list(tmp_path.glob(".*.pending"))
    runner.end_training()


def test_trainings_one_after_the_other_and_side_by_side(tmp_path: Path) -> None:
    runner = accelerator(tmp_path)
    gone, reports = [], []
    for fold in range(3):
        net, optimizer = runner.prepare(Tied(), torch.optim.SGD(Tied().parameters(), 0.1))
        critic = runner.prepare(nn.Linear(11, 1))
        exports = [OnnxExport(**QUICK).attach(runner, each) for each in (net, critic)]
        exports[0].attach(runner, net)  # again: it is told once
        critic(net(batch()))
        step(runner, net, optimizer, batch())
        runner.save_state()
        (found,) = names(tmp_path / "checkpoints" / f"checkpoint_{fold}") ^ {"model.onnx"}
        assert found == "model_1.onnx"
        reports += [report.global_step for report in exports[0].reports]
        gone.append(weakref.ref(net))
        net, optimizer, critic = runner.free_memory(net, optimizer, critic)
        del exports
    gc.collect()
    assert reports == [2] * 3
    assert [each() for each in gone] == [None] * 3


def test_what_is_compiled_is_seen_from_outside(tmp_path: Path) -> None:
    runner, export = accelerator(tmp_path, dynamo_backend="eager"), OnnxExport(**QUICK)
    net, optimizer = runner.prepare(Tied(), torch.optim.SGD(Tied().parameters(), 0.1))
    with pytest.raises(ConfigurationError, match="to be compiled"):
        export.attach(runner)
    export.attach(runner, net, step=10)
    for _ in range(2):
        for _ in range(4):
            step(runner, net, optimizer, batch())
        runner.save_state()
    runner.end_training()
    assert [report.error for report in export.reports] == [None, None]
    assert [report.global_step for report in export.reports] == [14, 18]
    assert export.reports[-1].inputs[0].shape[0] == "batch"


@pytest.mark.worker
def test_checkpoints_that_go_while_their_models_are_made(tmp_path: Path) -> None:
    runner, background = accelerator(tmp_path, limit=1), Background(drain_s=120)
    export = OnnxExport(**QUICK | {"background": background})
    net, optimizer = runner.prepare(Tied(), torch.optim.SGD(Tied().parameters(), 0.1))
    export.attach(runner)
    for _ in range(60):
        step(runner, net, optimizer, batch())
        runner.save_state()  # removes the last one, in which somebody is at work
    runner.end_training()
    assert names(tmp_path) == {"checkpoints/checkpoint_59/model.onnx"}
