"""One training, written for each framework: what the contract asks of all adapters.

A new adapter is a function here and a line in :data:`ADAPTERS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onnxport.exporter.checkpoint_file import read_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from onnxport import ExportReport

STEPS, EVERY, KEPT, BATCH = 12, 3, 2, 8


class Net(nn.Module):
    """Dropout, and a BatchNorm that may be frozen; gives logits of shape (N, 3)."""

    def __init__(self, *, frozen: bool = False, raises: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(16, 3)
        self.frozen, self.raises = frozen, raises

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises and not self.training:
            raise RuntimeError("not in eval mode (injected)")
        return self.head(self.drop(self.norm(self.first(x)).relu()))


@dataclass
class Plan:
    """What is trained, and what happens meanwhile.

    Args:
        root: Folder of the run.
        options: Of the callback; ``None``: there is no callback.
        net: What is trained.
        ema: Save averaged weights, where the framework does.
        saves: Whether checkpoints are written.
        during: Called before each step with the callback and the step's number.
        processes: How many train together; they know of each other already.
    """

    root: Path
    options: dict[str, Any] | None = field(default_factory=dict)
    net: Net = field(default_factory=Net)
    ema: bool = False
    saves: bool = True
    during: Callable[[Any, int], None] = lambda *_: None
    processes: int = 1

    @property
    def strategy(self) -> str:
        return "ddp" if self.processes > 1 else "auto"

    def spread(self, net: nn.Module) -> nn.Module:
        """Put around a module what people put there for several processes."""
        return net if self.processes == 1 else nn.parallel.DistributedDataParallel(net)

    @property
    def all_options(self) -> dict[str, Any]:
        return {"core": "trace", "background": False, "mlflow": False} | (self.options or {})


@dataclass
class Trained:
    """What is left of it.

    Args:
        losses: Of each step.
        net: As it is at the end.
        checkpoints: Of those that were kept, where the model should lie, and their weights.
        export: The callback.
        root: Folder of the run.
    """

    losses: list[float]
    net: Net
    checkpoints: dict[Path, dict[str, torch.Tensor]]
    export: Any
    root: Path

    @property
    def reports(self) -> list[ExportReport]:
        return self.export.reports


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels)


def averaged(net: Net) -> Any:
    return torch.optim.swa_utils.AveragedModel(net, use_buffers=True)


def lightning(plan: Plan, name: str = "lightning.pytorch") -> Trained:
    pl = importlib.import_module(name)
    from onnxport import OnnxExport

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = plan.net.train()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            plan.during(export, index)
            loss = loss_of(self(batch[0]), batch[1])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    losses: list[float] = []
    export = None if plan.options is None else OnnxExport(**plan.all_options)
    saves = pl.callbacks.ModelCheckpoint(
        plan.root, every_n_train_steps=EVERY, save_top_k=KEPT, monitor="step", mode="max"
    )
    callbacks = [saves] * plan.saves + [export] * (export is not None)
    if plan.ema:
        callbacks.append(pl.callbacks.EMAWeightAveraging())
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=plan.processes,
        strategy=plan.strategy,
        logger=False,
        callbacks=callbacks,
        default_root_dir=plan.root,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=plan.saves,
    )
    trainer.fit(Module(), DataLoader(rows(), BATCH))
    return trained(plan, losses, export, "*.ckpt")


def transformers(plan: Plan) -> Trained:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from onnxport.callbacks.transformers import OnnxExport

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plan.net

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
            logits = self.net(x)
            if labels is None:
                return {"logits": logits}
            loss = loss_of(logits, labels)
            losses.append(loss.item())
            return {"loss": loss, "logits": logits}

    class During(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            plan.during(export, state.global_step)

    losses: list[float] = []
    export = None if plan.options is None else OnnxExport(**plan.all_options)
    arguments = TrainingArguments(
        str(plan.root),
        max_steps=STEPS,
        save_steps=EVERY,
        save_strategy="steps" if plan.saves else "no",
        save_total_limit=KEPT,
        per_device_train_batch_size=BATCH,
        learning_rate=0.1,
        optim="sgd",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = [{"x": x, "labels": label} for x, label in rows()]
    callbacks = [During()] + [export] * (export is not None)
    trainer = Trainer(WithLoss(), arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trained(plan, losses, export, "checkpoint-*/model.safetensors")


def fabric(plan: Plan) -> Trained:
    from lightning.fabric import Fabric

    from onnxport.callbacks.fabric import OnnxExport

    options = plan.all_options
    export = None if plan.options is None else OnnxExport(folder=plan.root, **options)
    callbacks = [export] * (export is not None)
    runner = Fabric(
        accelerator="cpu", devices=plan.processes, strategy=plan.strategy, callbacks=callbacks
    )
    runner.launch()
    net, optimizer = runner.setup(plan.net, torch.optim.SGD(plan.net.parameters(), 0.1))
    ema = averaged(plan.net) if plan.ema else None

    def save(path: Path, step: int) -> None:
        state = net if ema is None else ema.module.state_dict()
        runner.save(path, {"model": state, "optimizer": optimizer, "step": step})

    losses = by_hand(plan, net, optimizer, export, runner.backward, ema, save)
    runner.call("on_train_end")
    return trained(plan, losses, export, "*.ckpt")


def loop(plan: Plan) -> Trained:
    from onnxport.callbacks.loop import Exporter

    optimizer = torch.optim.SGD(plan.net.parameters(), 0.1)
    ema = averaged(plan.net) if plan.ema else None
    net, state = plan.spread(plan.net), plan.net if ema is None else ema.module
    if plan.options is None:
        losses = by_hand(plan, net, optimizer, None, torch.Tensor.backward, ema, None)
        return trained(plan, losses, None, "*.ckpt")
    with Exporter(net, plan.root, **plan.all_options) as export:

        def save(path: Path, step: int) -> None:
            export.save(path, {"model": state.state_dict(), "step": step}, step=step)

        losses = by_hand(plan, net, optimizer, export, torch.Tensor.backward, ema, save)
    return trained(plan, losses, export, "*.ckpt")


def accelerate(plan: Plan) -> Trained:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from onnxport.callbacks.accelerate import OnnxExport

    places = ProjectConfiguration(
        str(plan.root), automatic_checkpoint_naming=True, total_limit=KEPT
    )
    accelerator = Accelerator(cpu=True, project_config=places)
    net, optimizer = accelerator.prepare(plan.net, torch.optim.SGD(plan.net.parameters(), 0.1))
    export = None
    if plan.options is not None:
        export = OnnxExport(**plan.all_options).attach(accelerator)

    def save(*_: Any) -> None:
        accelerator.save_state()

    losses = by_hand(plan, net, optimizer, export, accelerator.backward, None, save)
    if plan.processes > 1:  # others train next in the group
        accelerator.state.destroy_process_group = lambda: None
    accelerator.end_training()
    return trained(plan, losses, export, "checkpoints/*/model.safetensors")


def by_hand(
    plan: Plan, net: Any, optimizer: Any, export: Any, backward: Any, ema: Any, save: Any
) -> list[float]:
    """A loop as people write it, that keeps the last few checkpoints."""
    losses, written = [], []
    net.train()
    for step, (x, labels) in enumerate(DataLoader(rows(), BATCH), 1):
        plan.during(export, step - 1)
        loss = loss_of(net(x), labels)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if ema is not None:
            ema.update_parameters(plan.net)
        if step % EVERY == 0 and plan.saves and save is not None:
            path = plan.root / f"step={step}.ckpt"
            if len(written) == KEPT:
                written.pop(0).unlink(missing_ok=True)  # in each process
            save(path, step)
            written.append(path)
    return losses


def ignite(plan: Plan) -> Trained:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver, EMAHandler

    from onnxport.callbacks.ignite import OnnxExport

    optimizer = torch.optim.SGD(plan.net.parameters(), 0.1)
    net = plan.spread(plan.net)
    trainer = create_supervised_trainer(net, optimizer, nn.functional.cross_entropy)
    losses: list[float] = []
    saved: Any = net
    if plan.ema:
        averages = EMAHandler(plan.net)
        averages.attach(trainer, event=Events.ITERATION_COMPLETED)
        saved = averages.ema_model
    keeps = Checkpoint(
        {"model": saved, "optimizer": optimizer},
        DiskSaver(plan.root, create_dir=True, require_empty=False),
        n_saved=KEPT,
    )

    @trainer.on(Events.ITERATION_STARTED)
    def _(engine: Any) -> None:
        plan.during(export, engine.state.iteration - 1)

    @trainer.on(Events.ITERATION_COMPLETED)
    def _(engine: Any) -> None:
        losses.append(engine.state.output)

    if plan.saves:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=EVERY), keeps)
    export = None
    if plan.options is not None:
        export = OnnxExport(**plan.all_options)
        export.attach(trainer, keeps, model=plan.net if plan.ema else None)
    trainer.run(DataLoader(rows(), BATCH), max_epochs=1)
    return trained(plan, losses, export, "*.pt")


def toy(plan: Plan) -> Trained:
    from contract.toy_adapter import OnnxExport
    from contract.toy_framework import Plugin, Runner

    class During(Plugin):
        def before_step(self, runner: Runner, batch: Any) -> None:
            plan.during(export, runner.step)

    export = None if plan.options is None else OnnxExport(**plan.all_options)
    plugins = [During()] + [export] * (export is not None)
    net = plan.spread(plan.net)
    every = EVERY if plan.saves else 0
    runner = Runner(net, plan.root, every=every, keep=KEPT, plugins=plugins)
    data = DataLoader(rows(), BATCH)
    losses = runner.run(data, lambda module, batch: loss_of(module(batch[0]), batch[1]))
    return trained(plan, losses, export, "*.pth")


def trained(plan: Plan, losses: list[float], export: Any, pattern: str) -> Trained:
    """Read what the framework has kept."""
    if plan.processes > 1:
        torch.distributed.barrier()  # the first process writes, and may not have finished
    kept = {}
    for path in sorted(plan.root.glob(pattern)):
        state = read_state_dict(path)
        kept[path.with_suffix(".onnx")] = {
            name.removeprefix("module.").removeprefix("net."): tensor
            for name, tensor in state.items()
        }
    return Trained(losses, plan.net, kept, export, plan.root)


ADAPTERS: dict[str, Callable[[Plan], Trained]] = {
    "lightning": lightning,
    "pytorch_lightning": lambda plan: lightning(plan, "pytorch_lightning"),
    "transformers": transformers,
    "fabric": fabric,
    "ignite": ignite,
    "accelerate": accelerate,
    "loop": loop,
    "toy": toy,
}
WITH_AVERAGES = ("lightning", "pytorch_lightning", "fabric", "ignite", "loop")
"""Those whose framework, or whose user, saves averaged weights."""
