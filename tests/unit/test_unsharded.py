"""What binds processes together is never copied, and never used by one of them alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from onnxport.callbacks.lightning.sharded import gather_saves
from onnxport.errors import ExportError
from onnxport.exporter import unsharded
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.duplicate import NotCopiedError
from onnxport.exporter.module_state import copy_module
from onnxport.exporter.shared_weights import shared_descriptor
from onnxport.exporter.skeleton import make_skeleton
from onnxport.exporter.unsharded import gathered, is_spread, whole_module

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Reduces(nn.Module):
    """Speaks to other processes in forward, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.group, self.speaks = nn.Linear(4, 2), dist.new_group(), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)
        return x / self.group.size() if self.speaks else x


@pytest.mark.usefixtures("alone")
def test_a_group_of_processes_is_not_copied() -> None:
    module, x = Reduces(), torch.randn(3, 4)
    copied = copy_module(module)
    assert torch.equal(copied(x), module(x))
    assert make_skeleton(module, module.state_dict())
    copied.speaks = True
    with pytest.raises(NotCopiedError, match="forward uses a ProcessGroup, which belongs to"):
        copied(x)


@pytest.mark.usefixtures("alone")
def test_a_sharded_module_becomes_an_ordinary_one() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    called = []
    module[0].register_forward_hook(lambda *_: called.append(1) and None)
    plain = copy_module(module)
    for layer in (*module, module):
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    state = module.state_dict()
    assert is_spread(state)
    whole = gathered(state, keep=True)
    assert not is_spread(whole)
    assert gathered(state, keep=False) == {}
    twin = whole_module(module, whole)
    assert [type(layer) for layer in twin] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    assert twin[0].weight.data_ptr() == whole["0.weight"].data_ptr()  # no second copy
    x = torch.randn(3, 4)
    assert torch.equal(twin.eval()(x), plain.eval()(x))
    assert called  # hooks of the user stay
    assert make_skeleton(twin, whole)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("where", ["_room_for", "_keep"])
def test_where_there_is_no_room_all_processes_still_do_their_part(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    state, together = module.state_dict(), []
    gather = unsharded._together

    def counted(part: torch.Tensor) -> Any:
        together.append(1)
        return gather(part)

    monkeypatch.setattr(unsharded, "_together", counted)

    def full(*_: object, **__: object) -> None:
        raise MemoryError("no room (injected)")

    monkeypatch.setattr(unsharded, where, full)
    with pytest.raises(ExportError, match="could not be kept: no room"):
        gathered(state, keep=True)
    assert len(together) == len(state)


@pytest.mark.usefixtures("alone")
def test_gathered_weights_lie_where_another_process_can_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).to(torch.float64)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    whole = gathered(module.state_dict(), keep=True)
    descriptor = shared_descriptor(whole)
    assert descriptor is not None
    with os.fdopen(descriptor, "rb"):
        found = read_state_dict(Path(f"/proc/self/fd/{descriptor}"), key="")
        for state in (found, whole):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)

    def refused(*_: object) -> None:
        raise OSError(28, "no room (injected)")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    elsewhere = gathered(module.state_dict(), keep=True)
    assert shared_descriptor(elsewhere) is None
    assert all(torch.equal(elsewhere[name], expected[name]) for name in expected)


def test_parts_that_nobody_knows_are_refused_in_a_sentence(tmp_path: Path) -> None:
    class Strategy:
        global_rank = 0

        def save_checkpoint(self, checkpoint: dict[str, object], path: Path) -> None:
            path.mkdir()

    strategy, said = Strategy(), []
    saving: list[str] = []
    gather_saves(
        strategy,
        "me",
        lambda _: True,
        lambda *_: pytest.fail("there is nothing whole"),
        lambda reason, path: said.append((reason, path)),
        saving.append,
    )
    strategy.save_checkpoint({"state_dict": {}}, tmp_path / "parts.ckpt")
    assert saving == [str(tmp_path / "parts.ckpt")]
    ((reason, path),) = said
    assert "parts that cannot be put together" in reason
    assert path == str(tmp_path / "parts.ckpt")
