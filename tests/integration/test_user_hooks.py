"""Hooks of the user: those that watch see one more call, those that take part stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from torch import nn

from onnxport import OnnxExport

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


def fit(root: Path, module: zoo.Classifier, core: Any = "auto") -> OnnxExport:
    export = OnnxExport(core=core)
    trainer = zoo.trainer(root, zoo.checkpoints(root), export, epochs=2)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return export


def assert_computes_the_same(export: OnnxExport, module: nn.Module) -> None:
    image = torch.randn(5, 1, 8, 8)
    session = onnxruntime.InferenceSession(export.reports[-1].path)
    (given,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        expected = module.eval()(image)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("core", ["auto", "trace", "script"])
def test_a_hook_that_watches_sees_one_more_call_per_checkpoint(core: str, tmp_path: Path) -> None:
    module = zoo.Classifier(zoo.cnn())
    seen: list[tuple[type, torch.device]] = []
    module.net[0].register_forward_hook(lambda _, __, out: seen.append((type(out), out.device)))
    module.net[1].register_forward_pre_hook(lambda _, args: seen.append((type(args[0]), None)))
    export = fit(tmp_path, module, core)
    assert [report.error for report in export.reports] == [None, None]
    calls = 2 * 3 + 2 * 3 * 2 + 2 * 2  # training, validation twice per batch, sanity check
    assert len(seen) == 2 * (calls + 2 + 1)
    assert {kind for kind, _ in seen} == {torch.Tensor}
    assert len(module.net[0]._forward_hooks) == 1


def test_a_hook_that_changes_the_result_is_part_of_the_model(tmp_path: Path) -> None:
    module = zoo.Classifier(zoo.cnn())
    module.net[0].register_forward_hook(lambda _, __, out: out * 3)
    export = fit(tmp_path, module)
    assert [report.error for report in export.reports] == [None, None]
    assert_computes_the_same(export, module)


def test_a_hook_that_changes_in_place_is_part_of_the_model(tmp_path: Path) -> None:
    def triple(_: nn.Module, __: Any, out: torch.Tensor) -> None:
        out.mul_(3)

    module = zoo.Classifier(zoo.cnn())
    module.net[0].register_forward_hook(triple)
    export = fit(tmp_path, module, "trace")
    assert [report.error for report in export.reports] == [None, None]
    assert_computes_the_same(export, module)


class Tapped(nn.Module):
    """Reads in forward what a hook kept, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        self.rest = nn.Linear(8, 3)
        kept: dict[str, torch.Tensor] = {}
        self.kept = lambda: kept["features"]
        self.body.register_forward_hook(lambda _, __, out: kept.update(features=out))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.body(image)
        return self.rest(self.kept())


def test_a_hook_whose_catch_is_used_later_is_part_of_the_model(tmp_path: Path) -> None:
    module = zoo.Classifier(Tapped())
    export = fit(tmp_path, module, "trace")
    assert [report.error for report in export.reports] == [None, None]
    assert_computes_the_same(export, module)
