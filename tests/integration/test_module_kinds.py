"""Modules that are not what they seem: parametrized, lazy, adapted, quantisation-aware, compiled.

Each is exported with its checkpoint's weights, at every checkpoint, or refused in a sentence.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.utils import parametrizations

import onnxport
from onnxport import OnnxExport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.integration


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers)


class Adapted(nn.Module):
    """A frozen layer with a low-rank update beside it, as LoRA has."""

    def __init__(self, size: int, out: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(size, out).requires_grad_(False)
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=False)
        nn.init.normal_(self.up.weight, std=1 / math.sqrt(rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        """Return one layer that computes the same."""
        whole = nn.Linear(self.base.in_features, self.base.out_features)
        with torch.no_grad():
            whole.weight.copy_(self.base.weight + self.up.weight @ self.down.weight)
            whole.bias.copy_(self.base.bias)
        return whole


class Lazy(zoo.Classifier):
    """Learns its sizes from the first batch, before the optimizer is made."""

    def configure_model(self) -> None:
        with torch.no_grad():
            self.net(torch.zeros(1, 1, 8, 8))


class Parts(nn.Module):
    """One part is compiled, the others are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.compile(nn.Sequential(nn.Linear(64, 16), nn.ReLU()), backend="eager")
        self.last = nn.Linear(16, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(image.flatten(1)))


class Resolved(nn.Module):
    """A method is compiled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(nn.Linear(64, 3))
        self.inner.compile(backend="eager")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.inner(image)


def quantisation_aware(version: int) -> nn.Module:
    """Version 0 observes and quantises in two operators, version 1 in one that is fused."""
    net = mlp(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    net.qconfig = get_default_qat_qconfig("fbgemm", version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        return prepare_qat(net)


def pruned() -> nn.Module:
    layer = nn.Linear(64, 3)
    nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)
    return mlp(layer)


def recomputed() -> nn.Module:
    """Its activations are computed again in the backward pass."""
    net = mlp(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    apply_activation_checkpointing(net, check_fn=lambda layer: isinstance(layer, nn.Linear))
    return net


KINDS: dict[str, Callable[[], Any]] = {
    "weight norm": lambda: zoo.Classifier(mlp(parametrizations.weight_norm(nn.Linear(64, 3)))),
    "spectral norm": lambda: zoo.Classifier(mlp(parametrizations.spectral_norm(nn.Linear(64, 3)))),
    "orthogonal": lambda: zoo.Classifier(mlp(parametrizations.orthogonal(nn.Linear(64, 3)))),
    "activation checkpointing": lambda: zoo.Classifier(recomputed()),
    "pruned": lambda: zoo.Classifier(pruned()),
    "lazy": lambda: Lazy(mlp(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3))),
    "adapter": lambda: zoo.Classifier(mlp(Adapted(64, 3))),
    "a part compiled": lambda: zoo.Classifier(Parts()),
    "compiled in place": lambda: zoo.Classifier(Resolved()),
    "compiled": lambda: torch.compile(zoo.Classifier(zoo.cnn()), backend="eager"),
}


def fit(module: Any, root: Path, **options: Any) -> OnnxExport:
    export = OnnxExport(**options)
    trainer = zoo.trainer(root, zoo.checkpoints(root, filename="{epoch}"), export, epochs=2)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_checkpoint_has_its_model(kind: str, tmp_path: Path) -> None:
    module = KINDS[kind]()
    export = fit(module, tmp_path)
    assert [report.error for report in export.reports if not report.ok] == []
    assert len(export.reports) == 2
    models = sorted((tmp_path / "checkpoints").glob("*.onnx"))
    for model in models:
        state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
    live = getattr(module, "_orig_mod", module).eval()
    rows = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = live(rows).numpy()
    (found,) = onnxruntime.InferenceSession(models[-1]).run(None, {"image": rows.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


WHY = {0: "Data-dependent branch", 1: "has no ONNX translation in this core"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", list(WHY))
def test_observers_of_quantisation_are_refused_in_a_sentence(version: int, tmp_path: Path) -> None:
    export = fit(zoo.Classifier(quantisation_aware(version)), tmp_path)
    assert len(export.reports) == 2
    for report in export.reports:
        assert WHY[version] in str(report.error)
    assert not list(tmp_path.rglob("*.onnx"))


class Merged(nn.Module):
    """What the user deploys: the adapter merged into its layer."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.net = mlp(module.net[1].merged())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)


def test_an_adapter_is_merged_by_the_users_own_code(tmp_path: Path) -> None:
    module = zoo.Classifier(mlp(Adapted(64, 3)))
    export = fit(module, tmp_path, target=Merged, core="trace")
    assert [report.error for report in export.reports if not report.ok] == []
    session = onnxruntime.InferenceSession(export.reports[-1].path)
    rows = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = module.eval()(rows).numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
