"""The same seeded run with and without the callback, compared bit by bit."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import EMAWeightAveraging

from onnxport import OnnxExport

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

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
    make, more = VARIANTS[variant]
    pl.seed_everything(7)
    module, modes = make(), Modes()
    export = [] if core is None else [OnnxExport(core=core)]
    trainer = zoo.trainer(
        root, modes, zoo.checkpoints(root), *(cls() for cls in more), *export, epochs=3
    )
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    if export:
        assert [report.error for report in export[0].reports] == [None] * 3
    return {
        "losses": module.losses,
        "weights": module.state_dict(),
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "optimizer": trainer.optimizers[0].state_dict(),
        "modes": modes.seen,
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
