"""Fabric, Ignite and loops of one's own, where they are not as all others are."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from lightning.fabric import Fabric
from torch import nn

from onnxport import MLflow
from onnxport.callbacks import adapter, fabric, ignite
from onnxport.callbacks.loop import Exporter
from onnxport.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

QUICK: dict[str, Any] = {"core": "trace", "background": False, "mlflow": False, "console": False}


PEERS: tuple[dict[str, Any], ...] = ({}, {}, {"target": "0"})
"""Callbacks of one training: the second one has no names left."""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def models(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.onnx")}


# --- Fabric -----------------------------------------------------------------------------------


def test_a_part_of_the_weights_is_no_model(tmp_path: Path) -> None:
    callback = fabric.OnnxExport(folder=tmp_path, **QUICK)
    runner = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = runner.setup(network())
    net(torch.randn(3, 4))
    state = {"model": net, "step": 1}
    only_biases = {"model": lambda name, _: name.endswith("bias")}
    runner.save(tmp_path / "part.ckpt", state, filter=only_biases)
    runner.save(tmp_path / "other.ckpt", {"step": 1})
    runner.save(tmp_path / "whole.ckpt", state)
    assert models(tmp_path) == {"whole.onnx"}


def test_two_modules_have_models_of_the_first(tmp_path: Path) -> None:
    callback = fabric.OnnxExport(folder=tmp_path, **QUICK)
    runner = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    generator, critic = runner.setup(network()), runner.setup(nn.Linear(2, 1))
    critic(generator(torch.randn(3, 4)))
    runner.save(tmp_path / "both.ckpt", {"generator": generator, "critic": critic})
    (report,) = callback.reports
    assert report.ok, report.error
    assert [spec.shape for spec in report.outputs] == [("batch", 2)]


def test_two_callbacks_of_one_fabric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, same, part = (
        fabric.OnnxExport(folder=tmp_path, **QUICK, **options) for options in PEERS
    )
    runner = Fabric(accelerator="cpu", devices=1, callbacks=[first, same, part])
    net = runner.setup(network())
    net(torch.randn(3, 4))
    runner.save(tmp_path / "a.ckpt", {"model": net, "step": 1})
    assert models(tmp_path) == {"a.onnx", "a-0.onnx"}
    assert [each.ok for one in (first, same, part) for each in one.reports] == [True, False, True]
    assert "would write the same files" in caplog.text


@pytest.mark.worker
def test_an_end_that_nobody_announces(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from lightning.fabric import Fabric
            from onnxport.callbacks.fabric import OnnxExport
            folder = sys.argv[1]
            callback = OnnxExport(folder=folder, core="trace", mlflow=False, page=False)
            runner = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
            net = torch.nn.Linear(4, 2)
            net, optimizer = runner.setup(net, torch.optim.SGD(net.parameters(), 0.1))
            for step in range(4):
                runner.backward(net(torch.randn(3, 4)).square().mean())
                optimizer.step()
                runner.save(f"{folder}/step={step}.ckpt", {"model": net, "step": step})
            """
        )
    )
    command = [sys.executable, str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert models(tmp_path) == {f"step={step}.onnx" for step in range(4)}
    assert "4 of 4 checkpoints have a proven model" in done.stdout


# --- Ignite -----------------------------------------------------------------------------------


def engine(net: nn.Module) -> Engine:
    return Engine(lambda _, batch: net(batch).sum().backward())


def test_training_that_is_terminated_is_no_failure(tmp_path: Path) -> None:
    net = network()
    trainer = engine(net)
    keeps = Checkpoint({"net": net}, DiskSaver(tmp_path, require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), keeps)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), trainer.terminate)
    callback = ignite.OnnxExport(**QUICK).attach(trainer, keeps)
    trainer.run([torch.randn(3, 4)] * 9, max_epochs=1)
    assert [report.ok for report in callback.reports] == [True, True]
    assert models(tmp_path) == {"net_4.onnx"}


def test_two_callbacks_of_one_engine(tmp_path: Path) -> None:
    net = network()
    trainer = engine(net)
    keeps = Checkpoint({"net": net}, DiskSaver(tmp_path, require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), keeps)
    callbacks = [ignite.OnnxExport(**QUICK, **options).attach(trainer, keeps) for options in PEERS]
    for _ in range(2):  # its own names are not in its way
        trainer.run([torch.randn(3, 4)] * 5, max_epochs=1)
    assert models(tmp_path) == {"net_4.onnx", "net_4-0.onnx"}
    assert {each.ok for each in callbacks[1].reports} == {False}
    refused = ignite.OnnxExport(on_error="raise", **QUICK).attach(trainer, keeps)
    with pytest.raises(ConfigurationError, match="the same files"):
        trainer.run([torch.randn(3, 4)] * 5, max_epochs=1)
    assert refused.reports == []


def test_two_handlers_of_one_engine_have_models_each(tmp_path: Path) -> None:
    net = network()
    trainer = engine(net)
    for name in ("often", "seldom"):
        keeps = Checkpoint({"net": net}, DiskSaver(tmp_path / name, create_dir=True), n_saved=1)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), keeps)
        ignite.OnnxExport(on_error="raise", **QUICK).attach(trainer, keeps)
    trainer.run([torch.randn(3, 4)] * 5, max_epochs=1)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.onnx")}
    assert found == {"often/net_4.onnx", "seldom/net_4.onnx"}


def test_an_error_that_a_handler_takes_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the final weights become a model
    seen: list[BaseException] = []

    def fails(_: Engine, batch: torch.Tensor) -> None:
        net(batch)
        raise ZeroDivisionError

    net = network()
    trainer = Engine(fails)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: seen.append(error))
    ignite.OnnxExport(**QUICK).attach(trainer, model=net)
    trainer.run([torch.randn(3, 4)], max_epochs=1)
    assert [type(error) for error in seen] == [ZeroDivisionError]


def test_which_module_is_meant_must_be_clear(tmp_path: Path) -> None:
    both = Checkpoint({"a": network(), "b": network()}, DiskSaver(tmp_path))
    with pytest.raises(ConfigurationError, match=r"\['a', 'b'\]"):
        ignite.OnnxExport(**QUICK).attach(engine(network()), both)
    with pytest.raises(ConfigurationError, match="saves none"):
        ignite.OnnxExport(**QUICK).attach(engine(network()))


def test_a_handler_that_saves_elsewhere_is_refused() -> None:
    net = network()
    elsewhere = Checkpoint({"net": net}, lambda *_: None)
    with pytest.raises(ConfigurationError, match="a folder of this machine"):
        ignite.OnnxExport(**QUICK).attach(engine(net), elsewhere)


# --- loops ------------------------------------------------------------------------------------


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    net = network()
    with Exporter(net, tmp_path, **QUICK) as exporter:
        net(torch.randn(3, 4))
        with pytest.raises(ConfigurationError, match="holds no weights of the model"):
            exporter.save(tmp_path / "a.pt", {"step": 3})
    assert not (tmp_path / "a.pt").exists()


def test_validation_of_ones_own_is_lightnings() -> None:
    with pytest.raises(ConfigurationError, match="LightningModule's own"):
        Exporter(network(), validate_metrics=True)


def test_the_best_of_a_loop_is_champion(store: str, tmp_path: Path) -> None:
    net = network()
    options = QUICK | {"mlflow": MLflow(tracking_uri=store, register="net")}
    with Exporter(net, tmp_path, monitor="acc", mode="max", **options) as exporter:
        for step, acc in enumerate((0.3, 0.9, 0.5)):
            net(torch.randn(3, 4)).sum().backward()
            exporter.save(tmp_path / f"{step}.pt", metrics={"acc": acc}, step=step)
    versions = [report.tracking.alias for report in exporter.reports if report.tracking]
    assert versions == ["champion", "champion", None]
    assert exporter.reports[1].metrics == {"acc": 0.9}


def test_removed_checkpoints_take_their_models_with_them(tmp_path: Path) -> None:
    net = network()
    with Exporter(net, tmp_path, **QUICK) as exporter:
        for step in range(3):
            net(torch.randn(3, 4)).sum().backward()
            exporter.save(tmp_path / f"{step}.pt")
        exporter.remove(tmp_path / "0.pt")
        (tmp_path / "1.pt").unlink()
        exporter.save(tmp_path / "3.pt")
    assert models(tmp_path) == {"2.onnx", "3.onnx"}


def test_a_copy_makes_no_steps_and_the_module_is_as_it_was(tmp_path: Path) -> None:
    net = network()
    with Exporter(net, tmp_path, **QUICK) as exporter:
        averages = torch.optim.swa_utils.AveragedModel(net)
        net(torch.randn(3, 4))
        for _ in range(5):
            averages.module(torch.randn(3, 4))
        torch.save(net, tmp_path / "whole.pth")
        exporter.save(tmp_path / "a.pt")
    assert exporter.reports[0].global_step == 1
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    whole = torch.load(tmp_path / "whole.pth", weights_only=False)
    assert torch.equal(whole[0].weight, net[0].weight)


class Wraps(nn.Module):
    """Really has a part that is called as PyTorch's wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def test_a_part_that_is_called_module(tmp_path: Path) -> None:
    net = Wraps()
    with Exporter(net, tmp_path, **QUICK) as exporter:
        net(torch.randn(3, 4))
        averages = torch.optim.swa_utils.AveragedModel(net)
        exporter.save(tmp_path / "a.pt", {"model": net.state_dict()})
        exporter.save(tmp_path / "b.pt", {"model": averages.state_dict()})
    assert [report.error for report in exporter.reports if not report.ok] == []
    assert models(tmp_path) == {"a.onnx", "b.onnx"}


def test_a_process_that_was_forked_ends_no_training(tmp_path: Path) -> None:
    net = network()
    with Exporter(net, tmp_path, **QUICK) as exporter:
        adapter._end(weakref.ref(exporter), os.getpid() + 1)
        assert not exporter._over
        adapter._end(weakref.ref(exporter), os.getpid())
        assert exporter._over
