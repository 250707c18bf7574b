"""The same seeded run with and without the callback, compared bit by bit."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
import zoo
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from onnxport import OnnxExport

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


class Around(nn.Module):
    """A network of the user's own around one of torch's, which torch.compile takes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = zoo.cnn()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


class Stateful(Around):
    """Changes state in forward that is neither parameter nor buffer, and trains with it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(())
        self.mean = torch.zeros(1, 8, 8)
        self.calls: list[int] = []
        self.numpy = np.random.default_rng(0)
        self.python = random.Random(0)  # noqa: S311
        self.torch = torch.Generator().manual_seed(0)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(image))
        self.count += 1
        self.mean += (image.detach().mean(0) - self.mean) / self.count
        noise = torch.as_tensor(self.numpy.standard_normal(image.shape), dtype=image.dtype)
        noise = noise + torch.randn(image.shape, generator=self.torch) + self.python.random()
        return super().forward(image - self.mean + 0.1 * noise) / len(self.calls)


class Locked(Stateful):
    """Holds a lock, so it cannot be deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return super().forward(image)


class Keeping(Around):
    """Keeps what it computed, with its history."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(image)
        return self.kept


class Metered(Around):
    """Updates a metric in forward and trains with what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = torchmetrics.MeanMetric()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = super().forward(image)
        self.metric.update(logits.detach().mean())
        return logits * (1 + self.metric.compute()) if self.training else logits


class Padded(nn.Module):
    """A transformer that is told which positions are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        rows = image.squeeze(1)
        padding = rows.sum(-1) > 4
        return self.head(self.encoder(rows, src_key_padding_mask=padding).mean(1))


class LogsInForward(zoo.Classifier):
    """Its learning rate follows a mean of what forward logs."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = super().forward(image)
        self.log("confidence", logits.softmax(1).amax(1).mean(), on_step=False, on_epoch=True)
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", patience=0, threshold=0.1
        )
        plan = {"scheduler": scheduler, "monitor": "confidence"}
        return {"optimizer": optimizer, "lr_scheduler": plan}


def child_compiled(kind: type[zoo.Classifier], way: str) -> zoo.Classifier:
    module = kind(Around())
    if way == "wrapper":
        module.net = torch.compile(module.net, backend="eager", fullgraph=True)
    else:
        module.net.compile(backend="eager", fullgraph=True)
    return module


class CompilesLate(pl.Callback):
    """Compiles a child when our hooks may be on it already."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net.compile(backend="eager", fullgraph=True)


ODD = {
    "state": (lambda: zoo.Classifier(Stateful()), ()),
    "state and a lock": (lambda: zoo.Classifier(Locked()), ()),
    "kept results": (lambda: zoo.Classifier(Keeping()), ()),
    "metric in forward": (lambda: zoo.Classifier(Metered()), ()),
    "log in forward": (lambda: LogsInForward(zoo.cnn()), ()),
    "tied weights": (lambda: zoo.Classifier(zoo.Tied()), ()),
    "padding mask": (lambda: zoo.Classifier(Padded()), ()),
    "compiled": (lambda: torch.compile(zoo.Classifier(Around()), backend="eager"), ()),
    "compiled, no forward": (
        lambda: torch.compile(zoo.NoForward(Around()), backend="eager"),
        (),
    ),
    "compiled child": (lambda: child_compiled(zoo.Classifier, "compile()"), ()),
    "compiled child, no forward": (lambda: child_compiled(zoo.NoForward, "compile()"), ()),
    "wrapped child": (lambda: child_compiled(zoo.Classifier, "wrapper"), ()),
    "wrapped child, no forward": (lambda: child_compiled(zoo.NoForward, "wrapper"), ()),
    "compiled late": (lambda: zoo.Classifier(Around()), (CompilesLate,)),
    "compiled late, no forward": (lambda: zoo.NoForward(Around()), (CompilesLate,)),
}
NO_MODEL = {"state", "state and a lock"}
"""What cannot be exported: they are random in eval mode."""

VARIANTS = {
    "cnn": (lambda: zoo.Classifier(zoo.cnn()), ()),
    "frozen norm and dropout": (lambda: zoo.FrozenNorm(zoo.cnn()), ()),
    "transformer": (lambda: zoo.Classifier(zoo.Transformer()), ()),
    "averaged weights": (lambda: zoo.Classifier(zoo.cnn()), (EMAWeightAveraging,)),
}


class Modes(pl.Callback):
    """Records the training flag of every submodule at each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, ...]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(tuple(module.training for module in pl_module.modules()))


def run(root: Path, variant: str, core: str | None) -> dict[str, Any]:
    """Train for three epochs and return everything that could have changed."""
    make, more = (VARIANTS | ODD)[variant]
    pl.seed_everything(7)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    module, modes = make(), Modes()
    export = [] if core is None else [OnnxExport(core=core)]
    trainer = zoo.trainer(
        root, modes, zoo.checkpoints(root), *(cls() for cls in more), *export, epochs=3
    )
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    if export:
        assert [report.ok for report in export[0].reports] == [variant not in NO_MODEL] * 3
    module = getattr(module, "_orig_mod", module)
    return {
        "losses": module.losses,
        "weights": module.state_dict(),
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "optimizer": trainer.optimizers[0].state_dict(),
        "modes": modes.seen,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules()],
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),  # noqa: NPY002
    }


def assert_same(a: Any, b: Any, where: str = "run") -> None:
    """Compare nested values bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{place}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("core", ["auto", "torchscript"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loss_weight_optimizer_tensor_and_rng_state_is_bit_identical(
    variant: str, core: str, tmp_path: Path
) -> None:
    plain = run(tmp_path / "plain", variant, None)
    assert_same(plain, run(tmp_path / "export", variant, core))


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "compiled, no forward"))
        for name in ODD
    ],
)
def test_unusual_modules_train_as_without_the_callback(variant: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", variant, None)
    assert_same(plain, run(tmp_path / "export", variant, "trace"))


class WholeGraph(zoo.Classifier):
    """A step without anything that breaks a graph."""

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch["label"])


def test_a_graph_that_may_not_break_is_not_broken(tmp_path: Path) -> None:
    def train(root: Path, *callbacks: Any) -> Any:
        pl.seed_everything(7)
        torch._dynamo.reset()
        module = WholeGraph(Around())
        trainer = zoo.trainer(root, zoo.checkpoints(root), *callbacks)
        trainer.fit(torch.compile(module, backend="eager", fullgraph=True), zoo.loader())
        return module.state_dict()

    export = OnnxExport(core="trace")
    assert_same(train(tmp_path / "plain"), train(tmp_path / "export", export))
    assert [report.ok for report in export.reports] == [True, True]


def test_the_comparison_notices_one_bit(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", "cnn", None)
    other = run(tmp_path / "other", "cnn", None)
    weight = next(iter(other["weights"].values()))
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="weights"):
        assert_same(plain, other)


def test_a_failing_export_changes_nothing_either(tmp_path: Path) -> None:
    def train(root: Path, *callbacks: Any) -> Any:
        pl.seed_everything(7)
        module = zoo.Classifier(zoo.PythonInside())
        zoo.trainer(root, zoo.checkpoints(root), *callbacks, epochs=2).fit(module, zoo.loader())
        return [module.losses, module.state_dict(), torch.get_rng_state()]

    export = OnnxExport()
    plain = train(tmp_path / "plain")
    assert_same(plain, train(tmp_path / "export", export))
    assert [report.ok for report in export.reports] == [False, False]
