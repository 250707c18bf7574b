"""Reading a checkpoint's weights trusts nothing in it and refuses none."""

from __future__ import annotations

import collections
import enum
import os
import pickle
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from onnxport import ExportError
from onnxport.exporter.checkpoint_file import is_checkpoint, read_state_dict

if TYPE_CHECKING:
    from pathlib import Path


class Settings:
    """A class of the user's own."""

    def __init__(self) -> None:
        self.value = {"a": [1]}


class Kind(enum.Enum):
    """Another one."""

    FIRST = 1


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_weights_come_out_and_nothing_else_happens(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    net.register_parameter("tied", net[0].weight)
    content = {
        "state_dict": net.state_dict(),
        "settings": Settings(),
        "kind": Kind.FIRST,
        "evil": Evil(tmp_path / "evil"),
        "default": collections.defaultdict(list, {1: [2]}),
        "counter": collections.Counter("aab"),
        "array": np.arange(3),
        "set": {1, 2},
        "device": torch.device("cpu"),
        "sparse": torch.zeros(3).to_sparse(),
        "optimizer": torch.optim.AdamW(net.parameters()).state_dict(),
        "half": torch.zeros(2, dtype=torch.bfloat16),
    }
    file = tmp_path / "some.ckpt"
    torch.save(content, file)
    state = read_state_dict(file)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not (tmp_path / "evil").exists()


def test_a_tensor_with_attributes_is_a_tensor(tmp_path: Path) -> None:
    state = {"marked": torch.arange(3.0), "plain": torch.ones(2)}
    state["marked"].origin = "a hook"  # type: ignore[attr-defined]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    read = read_state_dict(tmp_path / "a.ckpt")
    assert read.keys() == state.keys()
    assert torch.equal(read["marked"], state["marked"])
    assert not hasattr(read["marked"], "origin")


def test_writing_to_what_was_read_changes_no_file(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    read_state_dict(tmp_path / "w.pt", "")["w"].add_(1)
    assert read_state_dict(tmp_path / "w.pt", "")["w"].tolist() == [0, 0, 0]


def test_a_file_that_was_removed_can_still_be_used(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(10_000)}, tmp_path / "w.pt")
    state = read_state_dict(tmp_path / "w.pt", "")
    (tmp_path / "w.pt").unlink()
    assert state["w"].sum() == 10_000


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"\x80\x02."])
def test_what_is_no_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    with pytest.raises(ExportError, match=r"bad\.ckpt cannot be read"):
        read_state_dict(tmp_path / "bad.ckpt")


def test_half_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "w.ckpt")
    content = (tmp_path / "w.ckpt").read_bytes()
    (tmp_path / "w.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match="cannot be read"):
        read_state_dict(tmp_path / "w.ckpt")


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "none.ckpt")


def saved_together(folder: Path, content: dict[str, Any]) -> Path:
    with warnings.catch_warnings(action="ignore"):
        checkpoint.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_folder_that_processes_have_written_gives_its_weights(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    folder = saved_together(
        tmp_path / "some.ckpt",
        {"state_dict": net.state_dict(), "optimizer_0": {"step": torch.ones(())}, "epoch": 3},
    )
    assert is_checkpoint(folder)
    assert not is_checkpoint(tmp_path)
    state = read_state_dict(folder)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_nothing_in_a_folder_is_executed(tmp_path: Path) -> None:
    folder = saved_together(tmp_path / "some.ckpt", {"state_dict": {"w": torch.ones(3)}})
    metadata = checkpoint.FileSystemReader(folder).read_metadata()
    metadata.planner_data = Evil(tmp_path / "evil")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with suppress(ExportError):
        read_state_dict(folder)
    assert not (tmp_path / "evil").exists()


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = saved_together(tmp_path / "some.ckpt", {"state_dict": {"w": torch.ones(3)}})
    for file in folder.glob("*.distcp"):
        file.unlink()
    with pytest.raises(ExportError, match=r"The weights in .*some\.ckpt cannot be read"):
        read_state_dict(folder)


WEIGHTS = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
OPTIMIZER = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "model": {"other": torch.ones(1)}},
        {"model": WEIGHTS, "optimizer": OPTIMIZER, "step": 3},
        {"model": WEIGHTS, "ema": {"weight": torch.ones(1)}},
        {"encoder": WEIGHTS, "optimizer": OPTIMIZER},
    ],
    ids=["nothing else", "usual", "beside an optimizer", "beside averages", "under another name"],
)
def test_weights_are_found_where_loops_of_peoples_own_put_them(
    content: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert set(read_state_dict(tmp_path / "a.pt")) == set(WEIGHTS)


def test_weights_that_may_be_either_of_two_are_none(tmp_path: Path) -> None:
    torch.save({"first": WEIGHTS, "second": WEIGHTS}, tmp_path / "a.pt")
    with pytest.raises(ExportError, match="state_dict"):
        read_state_dict(tmp_path / "a.pt")


def test_safetensors_that_are_damaged_are_named(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "model.safetensors"
    safetensors.save_file(WEIGHTS, file)
    assert torch.equal(read_state_dict(file)["weight"], WEIGHTS["weight"])
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ExportError, match=r"model.safetensors cannot be read"):
        read_state_dict(file)
