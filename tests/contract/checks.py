"""What is looked at after a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime
import torch
from contract.adapters import ADAPTERS, KEPT, Net, Plan, Trained

import onnxport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from pathlib import Path


def train(adapter: str, root: Path, **plan: Any) -> Trained:
    torch.manual_seed(0)
    net = Net(**plan.pop("net", {}))
    root.mkdir(parents=True, exist_ok=True)
    return ADAPTERS[adapter](Plan(root, net=net, **plan))


def assert_same_training(one: Trained, other: Trained) -> None:
    assert one.losses
    assert one.losses == other.losses
    for name, tensor in other.net.state_dict().items():
        assert torch.equal(one.net.state_dict()[name], tensor), name
    assert [m.training for m in one.net.modules()] == [m.training for m in other.net.modules()]


def assert_models_are_their_checkpoints(run: Trained) -> None:
    """Each checkpoint has a model with its very weights, which computes what PyTorch does."""
    assert len(run.checkpoints) == KEPT
    for model, state in run.checkpoints.items():
        net = Net()
        net.load_state_dict(state)
        session = onnxruntime.InferenceSession(model)
        (given,) = session.get_inputs()
        for size in (1, 5):  # neither is the size of a batch in training
            x = torch.randn(size, 6)
            with torch.no_grad():
                expected = net.eval()(x)
            (actual,) = session.run(None, {given.name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-5, rtol=1e-4)
        noted = read_metadata(model)["weights_sha256"]
        (report,) = [report for report in run.reports if report.path == str(model)][-1:]
        assert report.weights_sha256 == noted
        plain = onnxport.weights_sha256(state)
        prefixed = onnxport.weights_sha256({f"net.{name}": each for name, each in state.items()})
        assert noted in {plain, prefixed}


def assert_mirrored(run: Trained) -> None:
    """No model is there but those of the checkpoints, and nothing half-written."""
    assert set(run.root.rglob("*.onnx")) == set(run.checkpoints)
    left = [p for p in run.root.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]
    assert left == []
