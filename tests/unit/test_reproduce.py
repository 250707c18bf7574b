"""The folder that repeats a failed export."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onnxport.errors import VerificationError
from onnxport.exporter import reproduce
from onnxport.exporter.base import ExportRequest
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.reproduce import FailedAttempt, reproduction_path, write_reproduction
from onnxport.exporter.reproduce_script import BUILD_HERE
from onnxport.report import Check
from onnxport.tree import flatten

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x, scale=1.0, named=None):
        if x.float().sum() > 1e6:
            return {"y": -x}
        return {"y": torch.special.bessel_j0(x.float()) * scale, "n": 3}

class SizeBranch(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] > 2 else x - 1
"""


@dataclass
class Named:
    """No plain container: a call with it cannot be written down."""

    x: torch.Tensor


class Local(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def users_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "Net") -> nn.Module:
    """Import a module from a file of the user's, as a training script would."""
    file = f"users_net_{abs(hash(folder))}"
    (folder / f"{file}.py").write_text(NET, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    made: nn.Module = getattr(__import__(file), name)().eval()
    return made


def asked_for(module: nn.Module, *args: Any, **kwargs: Any) -> ExportRequest:
    spec, found = flatten((args, kwargs))
    tensors = tuple(tensor for _, tensor in found)
    return ExportRequest(
        module=FlatModule(module.eval(), spec),
        args=tensors,
        input_names=tuple(f"in{place}" for place in range(len(tensors))),
        output_names=("y",),
        input_axes=tuple({0: "batch"} for _ in tensors),
        output_axes=({0: "batch"},),
        opset=20,
    )


def refuse(error: Exception) -> None:
    raise error


def failed(core: str = "trace", variant: str = "", error: Exception | None = None) -> FailedAttempt:
    try:
        refuse(error or RuntimeError("it failed"))
    except Exception as raised:  # noqa: BLE001 - the error is what is asked for
        return FailedAttempt(
            core=core, variant=variant, error=raised, output="graph(%x)\n", reason="It cannot."
        )
    raise AssertionError("no error")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "reproduce.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.integration
def test_the_script_repeats_each_failing_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = users_module(tmp_path, monkeypatch)
    request = asked_for(module, torch.ones(4, 3), scale=2.0, named={"a": None, "b": [1, "c"]})
    folder = reproduction_path(tmp_path / "epoch=3.onnx")
    attempts = [failed("dynamo"), failed("trace"), failed("script", "patched")]
    assert write_reproduction(folder, request, attempts) == folder
    assert folder.name == "epoch=3.onnx.failed"
    done = run(folder)
    assert done.returncode == 1, done.stdout + done.stderr
    steps = re.split(r"(?m)^--- ", done.stdout)[1:]
    titles = [step.partition("\n")[0] for step in steps]
    assert titles == [
        "1: dynamo",
        "2: trace",
        "3: script patched",
    ]
    assert "data-dependent" in steps[0]
    assert "'aten::special_bessel_j0' to ONNX opset version 20" in steps[1]
    assert "<--- HERE" in steps[2]
    assert "onnxport" not in done.stdout


@pytest.mark.integration
def test_one_step_can_be_repeated_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked_for(users_module(tmp_path, monkeypatch), torch.ones(4, 3))
    folder = tmp_path / "m.onnx.failed"
    write_reproduction(folder, request, [failed("dynamo"), failed("trace")])
    done = run(folder, "2")
    assert done.stdout.startswith("--- 2: trace")
    assert "bessel_j0" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.integration
def test_a_step_whose_model_was_wrong_is_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked_for(users_module(tmp_path, monkeypatch, "SizeBranch"), torch.ones(4, 3))
    check = Check(
        provider="CPUExecutionProvider",
        sizes={"batch": 1},
        rows="negated",
        reference="table",
        outputs=(),
        ok=False,
    )
    wrong = failed("trace", error=VerificationError("They disagree.", (check,)))
    write_reproduction(tmp_path / "m.onnx.failed", request, [wrong])
    done = run(tmp_path / "m.onnx.failed")
    assert done.returncode == 1
    assert "Tensor-likes are not close" in done.stdout
    # Negative control: at a size that takes the branch that was traced nothing is wrong.
    script = tmp_path / "m.onnx.failed" / "reproduce.py"
    script.write_text(script.read_text("utf-8").replace("{'batch': 1}", "{'batch': 5}"), "utf-8")
    done = run(tmp_path / "m.onnx.failed")
    assert done.returncode == 0, done.stdout
    assert "does not fail here" in done.stdout


def test_inputs_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = (
        torch.randn(4, 3).bfloat16(),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.arange(4),
        torch.tensor([True, False, True, True]),
        torch.randn(4, 6)[:, ::2],
        torch.zeros(4, 0),
    )
    request = asked_for(users_module(tmp_path, monkeypatch), *tensors)
    folder = tmp_path / "m.onnx.failed"
    write_reproduction(folder, request, [failed()])
    scope: dict[str, Any] = {"__name__": "script", "__file__": str(folder / "reproduce.py")}
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = (folder / "reproduce.py").read_text("utf-8")
    exec(compile(source, "reproduce.py", "exec"), scope)  # noqa: S102 - our own text
    loaded = scope["load_inputs"]()
    for tensor, again in zip(tensors, loaded, strict=True):
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)
    assert str(tmp_path) in sys.path


def test_a_call_that_cannot_be_written_down_is_saved_with_the_module(tmp_path: Path) -> None:
    request = asked_for(Local(), Named(torch.ones(4, 3)))
    write_reproduction(tmp_path / "m.failed", request, [failed("trace")])
    text = (tmp_path / "m.failed" / "reproduce.py").read_text("utf-8")
    assert "and onnxport: an argument of the call has no plain form" in text
    assert isinstance(
        torch.load(tmp_path / "m.failed" / "module.pt", weights_only=False), FlatModule
    )


def unpicklable(module: nn.Module) -> nn.Module:
    module.hook = lambda x: x
    return module


@pytest.mark.parametrize(
    ("change", "limit", "why"),
    [
        (unpicklable, 10**6, "it cannot be pickled"),
        (lambda module: module, 3, "it has 32 bytes, more than 3"),
    ],
)
def test_a_module_that_is_not_saved_leaves_a_marked_line(
    change: Any, limit: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked_for(change(users_module(tmp_path, monkeypatch)), torch.ones(4, 3))
    folder = tmp_path / "m.failed"
    assert write_reproduction(folder, request, [failed()], max_module_bytes=limit)
    assert not (folder / "module.pt").exists()
    text = (folder / "reproduce.py").read_text("utf-8")
    assert why in text
    assert BUILD_HERE in text
    done = run(folder)
    assert done.returncode == 1
    assert "build the module in load_module()" in done.stdout


SCRIPT_OF_A_USER = """
import sys
from pathlib import Path

import torch
from torch import nn

SCALE = 2.0


class Part(nn.Module):
    def forward(self, x):
        return helper(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(x)


def helper(x):
    return x * SCALE


from test_reproduce import asked_for, failed
from onnxport.exporter.reproduce import write_reproduction

write_reproduction(Path(sys.argv[1]), asked_for(Net(), torch.ones(4, 3)), [failed("dynamo")])
print("trained")
"""


def test_a_class_of_the_script_that_was_run_is_there(tmp_path: Path) -> None:
    script, folder = tmp_path / "train.py", tmp_path / "m.failed"
    script.write_text(SCRIPT_OF_A_USER, encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(script), str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    script.unlink()
    assert "cloudpickle" in (folder / "reproduce.py").read_text("utf-8")
    done = run(folder)
    assert "does not fail here" in done.stdout
    assert "trained" not in done.stdout


@pytest.mark.parametrize(
    "big",
    [list(range(10**6)), torch.zeros(10**6), np.zeros(10**6)],
    ids=["list", "tensor", "array"],
)
def test_data_that_a_script_names_is_not_saved(
    big: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_MOST_OF_CODE", 10**5)
    kind = type("Net", (nn.Identity,), {"__module__": "__main__", "data": lambda _: big})
    folder = tmp_path / "m.failed"
    write_reproduction(folder, asked_for(kind(), torch.ones(2)), [failed()], max_module_bytes=10)
    assert not (folder / "module.pt").exists()
    assert "bytes of data" in (folder / "reproduce.py").read_text("utf-8")


def test_logs_hold_the_traceback_and_what_was_printed(tmp_path: Path) -> None:
    cause = ValueError("the cause")
    error = RuntimeError("the shell")
    error.__cause__ = cause
    folder = tmp_path / "m.failed"
    attempts = [failed("dynamo", "automatic dims", error), failed("trace")]
    write_reproduction(folder, asked_for(Local(), torch.ones(2, 3)), attempts)
    assert sorted(path.name for path in folder.iterdir()) == [
        "01-dynamo.log",
        "02-trace.log",
        "inputs.npz",
        "module.pt",
        "reproduce.py",
        "versions.txt",
    ]
    log = (folder / "01-dynamo.log").read_text("utf-8")
    assert log.startswith("dynamo (automatic dims)\nIt cannot.\n")
    assert "ValueError: the cause" in log
    assert "test_reproduce.py" in log
    assert log.endswith("graph(%x)\n\n")
    assert f"torch {torch.__version__}" in (folder / "versions.txt").read_text("utf-8")


def test_an_older_folder_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    request = asked_for(Local(), torch.ones(2, 3))
    folder = tmp_path / "m.failed"
    write_reproduction(folder, request, [failed("dynamo"), failed("trace")])
    write_reproduction(folder, request, [failed("script")])
    assert [path.name for path in folder.glob("*.log")] == ["01-script.log"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_script_of_another_process_is_nowhere_to_be_found(tmp_path: Path) -> None:
    class FromAScript(nn.Identity):
        """Sent by value to a process whose ``__main__`` is another one."""

    FromAScript.__module__, FromAScript.__qualname__ = "__main__", "FromAScript"
    write_reproduction(tmp_path / "m.failed", asked_for(FromAScript(), torch.ones(2)), [failed()])
    text = (tmp_path / "m.failed" / "reproduce.py").read_text("utf-8")
    assert "sys.path[:0] = []" in text


def test_a_folder_that_is_not_ours_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "m.failed"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years", encoding="utf-8")
    assert write_reproduction(folder, asked_for(Local(), torch.ones(2)), [failed()]) is None
    assert (folder / "thesis.txt").read_text("utf-8") == "years"
    assert "is not a reproduction" in caplog.text
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_that_does_not_take_it_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    request = asked_for(Local(), torch.ones(2))
    assert write_reproduction(tmp_path / "file" / "m.failed", request, [failed()]) is None
    assert "No reproduction was written" in caplog.text


def test_a_tensor_that_cannot_be_saved_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = asked_for(Local(), torch.ones(2, 3).to_sparse())
    assert write_reproduction(tmp_path / "m.failed", request, [failed()]) is None
    assert "No reproduction was written" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_have_no_literal_are_written_so_that_they_run(tmp_path: Path) -> None:
    kwargs = {"a": float("nan"), "b": torch.float16, "c": torch.device("cpu"), "d": (1,)}
    request = asked_for(Local(), torch.ones(2), **kwargs)
    write_reproduction(tmp_path / "m.failed", request, [failed()])
    text = (tmp_path / "m.failed" / "reproduce.py").read_text("utf-8")
    call = "'a': float('nan'), 'b': torch.float16, 'c': torch.device(type='cpu'), 'd': (1,)"
    assert f"self.module(*(tensors[0],), **{{{call}}})" in text
    assert np.load(tmp_path / "m.failed" / "inputs.npz")["arr_0"].tolist() == [1.0, 1.0]
