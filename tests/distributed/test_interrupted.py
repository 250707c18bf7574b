"""Training that is interrupted: it ends as it would, and what is kept has its models."""

from __future__ import annotations

import os
import signal
import stat
import textwrap
import time
from typing import TYPE_CHECKING

import onnx
import pytest
import torch
from processes import TESTS, started
from servers import free_port

import onnxport
from onnxport.exporter.ownership import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from processes import Family

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.worker]

SCRIPT = f"""
    import atexit, datetime, os, signal, sys, time, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, {TESTS!r})
    import torch, zoo
    from pathlib import Path
    from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
    from onnxport import OnnxExport

    root, what, sent = Path(sys.argv[1]), sys.argv[2], set()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none

    # Gloo's threads must not outlive Python with what training was waiting for: that ends a process
    # by SIGABRT now and then (pytorch issue 190489), and Lightning sees to it for NCCL only.
    @atexit.register
    def leave():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    class Trouble(Callback):
        "Goes on for ever, until something happens."
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            time.sleep(0.02)
            ranks = {{"all raise": (0, 1), "first raises": (0,), "second raises": (1,)}}
            late = trainer.global_step >= 12 and (root / "checkpoints" / "last.onnx").exists()
            if trainer.world_size > 1 and what in ranks:
                late = trainer.strategy.broadcast(late)
            for number in (signal.SIGUSR1, signal.SIGTERM) if what == "slurm" else ():
                # Lightning's handlers speak to all processes: each must be at the same point.
                if trainer.strategy.broadcast((root / f"send-{{number}}").exists()):
                    if number not in sent:
                        sent.add(number)
                        signal.raise_signal(number)
            if late and trainer.global_rank in ranks.get(what, ()):
                raise ValueError("the user's own")

    saves = zoo.checkpoints(root, save_top_k=2, save_last=True, monitor="val_loss")
    devices = 1 if len(sys.argv) > 3 else 2
    trainer = zoo.trainer(
        root, saves, OnnxExport(core="trace"), Trouble(),
        *([OnExceptionCheckpoint(root / "checkpoints")] if what == "all raise" else []),
        strategy="auto" if devices == 1 else "ddp", devices=devices, epochs=-1,
        max_time=datetime.timedelta(seconds=5) if what == "max_time" else None,
    )
    if __name__ == "__main__":
        torch.manual_seed(0)
        trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader(32), zoo.loader(32, shuffle=False))
        print("fit returned", trainer.global_step)
"""


def assert_models_are_right(folder: Path) -> None:
    """Each model under its final name is whole, and holds its checkpoint's weights."""
    models = list(folder.glob("*.onnx"))
    assert models
    assert not [path for path in folder.iterdir() if path.name.startswith(".onnxport")]
    for model in models:
        onnx.checker.check_model(model)
        state = torch.load(model.with_suffix(".ckpt"), weights_only=False)["state_dict"]
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)


def assert_each_has_a_model(folder: Path) -> None:
    checkpoints = {path.stem for path in folder.glob("*.ckpt")}
    assert {path.stem for path in folder.glob("*.onnx")} == checkpoints
    assert_models_are_right(folder)


def assert_nobody_is_left(family: Family) -> None:
    end = time.monotonic() + 15
    while (left := family.living()) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def has_models(folder: Path) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("*.onnx"))) >= 2


def launched(_: int) -> Mapping[str, str]:
    return {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c(devices: int, tmp_path: Path) -> None:
    """One command starts the other processes; a terminal sends the signal to all of them."""
    folder = tmp_path / "checkpoints"
    arguments = [str(tmp_path), "ctrl-c", *(["alone"] if devices == 1 else [])]
    with started(textwrap.dedent(SCRIPT), tmp_path, 1, *arguments, environment=launched) as family:
        family.until(has_models(folder))
        family.signal(signal.SIGINT)
        (code,) = family.wait(60)
        # Lightning kills the other processes, then leaves with 1. A thread of its own, which looks
        # after them every five seconds, kills this one, too, if it looks just then.
        killed = code == -signal.SIGKILL and "Forcefully terminating all" in family.said
        assert code == 1 or (devices == 2 and killed), family.said
        assert_nobody_is_left(family)
        assert "onnxport failed" not in family.said
    if not killed:
        assert_each_has_a_model(folder)
    assert_models_are_right(folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "what",
    [
        "first raises",
        *(
            pytest.param(what, marks=pytest.mark.exhaustive)
            for what in ("all raise", "second raises")
        ),
    ],
)
def test_an_exception_of_the_user(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with started(textwrap.dedent(SCRIPT), tmp_path, 2, str(tmp_path), what) as family:
        assert 0 not in family.wait(120)  # who still waits for the other sees that it is gone
        assert_nobody_is_left(family)
        assert "the user's own" in family.said
        assert "onnxport failed" not in family.said
    assert_models_are_right(folder)
    if what == "all raise":
        assert (folder / "on_exception.onnx").exists()
        assert_each_has_a_model(folder)


@pytest.mark.exhaustive
def test_max_time(tmp_path: Path) -> None:
    with started(textwrap.dedent(SCRIPT), tmp_path, 2, str(tmp_path), "max_time") as family:
        assert family.wait() == [0, 0], family.said
        assert family.said.count("fit returned") == 2
        assert_nobody_is_left(family)
    assert_each_has_a_model(tmp_path / "checkpoints")


def as_slurm(folder: Path) -> Callable[[int], Mapping[str, str]]:
    """What SLURM sets, and its command to put the job into the queue again."""
    command = folder / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    port = str(free_port())
    return lambda rank: {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
    }


@pytest.mark.exhaustive
def test_preempted_by_slurm(tmp_path: Path) -> None:
    """The signal to requeue goes to all processes of the job, the worker with them."""
    folder, slurm = tmp_path / "checkpoints", as_slurm(tmp_path)
    arguments = (str(tmp_path), "slurm")
    with started(textwrap.dedent(SCRIPT), tmp_path, 2, *arguments, environment=slurm) as family:
        family.until(has_models(folder))
        family.signal(signal.SIGUSR1, ranks=False)
        (tmp_path / f"send-{signal.SIGUSR1}").touch()
        family.until((tmp_path / "requeued").exists)
        family.until((tmp_path / "hpc_ckpt_1.onnx").exists)
        family.signal(signal.SIGTERM, ranks=False)
        (tmp_path / f"send-{signal.SIGTERM}").touch()
        family.wait(60)
        assert_nobody_is_left(family)
        assert "onnxport failed" not in family.said
        assert "ended at work" not in family.said
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
    assert_each_has_a_model(folder)
    assert_models_are_right(tmp_path)
