"""Every class of failure, provoked for real: the reason names the line and the way out."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import onnx_ir as ir
import pytest
import torch
import zoo
from torch import nn
from torch._higher_order_ops.map import map as torch_map
from torch.nn import functional

from onnxport import OnnxExport, VerificationError, verify
from onnxport._torch_compat import captured_output, export_context
from onnxport.exporter.base import ExportRequest
from onnxport.exporter.dynamo import DynamoCore
from onnxport.exporter.explain import classify, explain, explain_mismatch
from onnxport.exporter.failures import FAILURES, MISMATCHES
from onnxport.exporter.flat import FlatModule
from onnxport.exporter.torchscript import ScriptCore, TraceCore
from onnxport.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

HERE = "test_explanations.py"
CORES = {"dynamo": DynamoCore(), "trace": TraceCore(), "script": ScriptCore()}
X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A module whose ``forward`` is a function of one tensor."""


class Operator(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x.transpose(1, 2) @ x).real


class CaseOfOperator(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.adaptive_avg_pool1d(x, 2)


@torch.library.custom_op("onnxport_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class CustomOperator(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.onnxport_test.twice(x)


class RandomOperator(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.poisson(x.abs())


class Layout(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(x[0].to_sparse(), x[0].T)


class MetaKernel(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.onnxport_test.no_meta(x)


torch.library.define("onnxport_test::no_meta", "(Tensor x) -> Tensor")
torch.library.impl("onnxport_test::no_meta", "CPU", lambda x: x + 1)


class Branch(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class DistributionArguments(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(x, x.abs() + 1).mean


class Number(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.abs().max()) + 1):
            x = x + 1
        return x


class PythonMath(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * math.sqrt(x.shape[0])


class DataDependentSize(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x[x > 0]
        if found.shape[0] > 3:
            return found * 2
        return found


class SizeBranch(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 6:
            return x + 1
        return x


class FixedTensor(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + torch.ones(6, 1, 1)


class ConcreteSize(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return x + torch.randn(x.shape, generator=generator)


class NumPy(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(x.numpy(), axis=1))


class NumPyWithoutMirror(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(np.interp(x.numpy(), [0.0, 1.0], [1.0, 2.0])).float()


class DataPointer(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import copy

        return copy.deepcopy(x) + 1


class ScriptedInside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.jit.script(nn.Linear(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class CompiledInside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(nn.Linear(3, 2), backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class HigherOrder(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_map(lambda a, b: a * b, x, x[0])


class GradientInside(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda row: row * row.sum().item())(x)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ARG004
        return grads


class CustomFunction(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Clamp.apply(x)


class Generator(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(3))


class StateInLists(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return x + len(self.seen)


class VariableArguments(Net):
    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return xs[0] + 1


class AnnotationMissing(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first({"a": x})

    def first(self, named):  # noqa: ANN001, ANN201 - that is the point
        return named["a"]


class ContextManager(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x + 1


class UnsupportedPython(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(map(lambda row: row + 1, [x]))  # noqa: C417 - it is the lambda that matters


class Structure(Net):
    def forward(self, x: torch.Tensor) -> None:
        return None


class View(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).view(x.shape[0], -1)


class InPlace(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.resize_(2, 3)
        return y


class Complex(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(1j * x).angle()


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class OutOfMemory(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1, :1] * torch.zeros(1 << 46)[:3]


class Attention(Net):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 36)
        self.bias = nn.Parameter(torch.zeros(1, 2, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).reshape(x.shape[0], 4, 3, 2, 6).permute(2, 0, 3, 1, 4)
        bias = self.bias.expand(x.shape[0], 2, 4, 4)
        q, k, v = heads.unbind(0)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        return seen.contiguous().view(x.shape[0], 4, 12)


class NoSource(Net):
    """Calls a function that has no file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return made_at_run_time(x)  # noqa: F821 - by exec, below


exec("def made_at_run_time(x):\n    return x * 2")  # noqa: S102 - as frameworks make functions


@dataclass(frozen=True)
class Provoked:
    name: str
    net: type[Net]
    core: str
    statement: str
    advice: str


PROVOKED = [
    Provoked("operator", Operator, "dynamo", "torch.linalg.eigvals(", "register_custom_op"),
    Provoked("operator", Operator, "trace", "torch.linalg.eigvals(", "register_custom_op"),
    Provoked(
        "case of an operator",
        CaseOfOperator,
        "trace",
        "functional.adaptive_avg",
        "avoids this case",
    ),
    Provoked("custom operator", CustomOperator, "dynamo", "test.twice(x)", "is_in_onnx_export"),
    Provoked("custom operator", CustomOperator, "trace", "test.twice(x)", "is_in_onnx_export"),
    Provoked("random operator", RandomOperator, "dynamo", "torch.poisson(", "as an input"),
    Provoked("tensor layout", Layout, "trace", "torch.sparse.mm(", "dense tensors"),
    Provoked("operator without shapes", MetaKernel, "dynamo", "no_meta(x)", "register_fake"),
    Provoked("data-dependent branch", Branch, "dynamo", "if x.sum() > 0:", "torch.where("),
    Provoked(
        "distribution arguments", DistributionArguments, "dynamo", "Normal(", "validate_args=False"
    ),
    Provoked("data-dependent number", Number, "dynamo", "range(int(", "Keep it a tensor"),
    Provoked("data-dependent size", DataDependentSize, "dynamo", "found.shape[0] > 3", "x[mask]"),
    Provoked("python math", PythonMath, "dynamo", "math.sqrt(", "torch.sqrt("),
    Provoked("dimension specialised", SizeBranch, "dynamo", "x.shape[0] == 6:", "x.shape"),
    Provoked("dimension specialised", FixedTensor, "dynamo", "torch.ones(6, 1, 1)", "new_zeros"),
    Provoked("concrete size needed", ConcreteSize, "dynamo", "torch.randn(x.shape", "new_zeros"),
    Provoked("numpy", NumPyWithoutMirror, "dynamo", "np.interp(", "instead of np."),
    Provoked("data pointer", DataPointer, "dynamo", "copy.deepcopy(x)", "x.clone()"),
    Provoked("scripted inside", ScriptedInside, "trace", "self.net(x)", "plain module"),
    Provoked("compiled inside", CompiledInside, "trace", "self.net(x)", "_orig_mod"),
    Provoked("higher-order operator", HigherOrder, "dynamo", "torch_map(", "x.clone()"),
    Provoked("gradient inside", GradientInside, "trace", "torch.func.vmap(", "batched"),
    Provoked("custom autograd function", CustomFunction, "script", "x.clamp(", "self.training"),
    Provoked("generator", Generator, "trace", "torch.randn(6", "as an input"),
    Provoked("script: variable arguments", VariableArguments, "script", "*xs", "Name the"),
    Provoked("script: annotation missing", AnnotationMissing, "script", 'named["a"]', "Annotate"),
    Provoked("script: no source", NoSource, "script", "", "Define it in a file"),
    Provoked(
        "script: context manager", ContextManager, "script", "torch.enable_grad()", "out of forward"
    ),
    Provoked("script: unsupported python", UnsupportedPython, "script", "lambda row", "jit.unused"),
    Provoked("attention view", Attention, "dynamo", "seen.contiguous()", "SDPBackend.MATH"),
    Provoked("view", View, "dynamo", ".view(x.shape[0], -1)", "Use .reshape(...)"),
    Provoked("view", View, "script", ".view(x.shape[0], -1)", "Use .reshape(...)"),
    Provoked("in-place", InPlace, "script", "y.resize_(2, 3)", "Make a new tensor"),
    Provoked("complex", Complex, "trace", "torch.exp(1j * x)", "real and the imaginary"),
    Provoked("complex", Complex, "dynamo", "torch.exp(1j * x)", "real and the imaginary"),
    Provoked("parametrization", Parametrized, "trace", "self.net(x)", "remove_parametrizations"),
    Provoked("out of memory", OutOfMemory, "trace", "torch.zeros(1 << 46)", "smaller example"),
    # Of these torch says no line.
    Provoked(
        "state kept in lists", StateInLists, "script", "self.seen.append(", "in training only"
    ),
    Provoked("structure", Structure, "script", "", "Return tensors"),
    Provoked("numpy", NumPy, "script", "", "instead of np."),
]


def asked_for(module: nn.Module) -> ExportRequest:
    spec, _ = flatten(((X,), {}))
    return ExportRequest(
        module=FlatModule(module.eval(), spec),
        args=(X,),
        input_names=("x",),
        output_names=("output",),
        input_axes=({0: "batch"},),
        output_axes=({0: "batch"},),
        opset=20,
    )


@pytest.fixture(autouse=True)
def _checked_distributions() -> Iterator[None]:
    """``torch.compile``, wherever it was used before, turns these checks off for the process."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


def failure(request: ExportRequest, core: str) -> Exception:
    try:
        with export_context(), captured_output():
            CORES[core].export(request)
    except Exception as error:  # noqa: BLE001 - the error is what is asked for
        return error
    raise AssertionError("it exports")


@pytest.mark.parametrize("case", PROVOKED, ids=lambda case: f"{case.name}-{case.core}")
def test_a_reason_names_the_line_and_the_smallest_change(case: Provoked) -> None:
    request = asked_for(case.net())
    error = failure(request, case.core)
    known = classify(error)
    reason = explain(error, request=request)
    assert known is not None, reason
    assert known.name == case.name, reason
    assert case.advice in reason
    if case.statement:
        quoted = re.search(rf"{HERE}:(\d+) in \S+ \(`(.*?)`\)[.:]", reason)
        assert quoted is not None, reason
        assert case.statement in quoted[2]


def test_a_fixed_dimension_is_called_by_its_name() -> None:
    request = asked_for(SizeBranch())
    reason = explain(failure(request, "dynamo"), request=request)
    assert reason.startswith("The dimension 'batch' (axis 0 of 'x') is specialised to 6, at ")
    assert explain(failure(request, "dynamo")).startswith("The dimension axis 0 of input 0 is")


def test_an_error_of_the_modules_own_is_told_as_it_is() -> None:
    class Refuses(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("the temperature is not set")

    request = asked_for(Refuses())
    for core in ("dynamo", "trace"):
        reason = explain(failure(request, core), request=request)
        assert reason.startswith(f"ValueError: the temperature is not set, at {__file__}:")


def test_a_process_that_died_is_told() -> None:
    with pytest.raises(subprocess.CalledProcessError, match="died") as caught:
        subprocess.run([sys.executable, "-c", "import os; os.abort()"], check=True)
    assert explain(caught.value).startswith("The process that exported crashed: ")


# --- models that come out and are wrong ---------------------------------------------------------


class Float64Kernel(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.softplus(x.double()).float()


class FrozenSize(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(int(x.shape[0]), 1, 1)


class InvalidGraph(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = int(x.abs().max()) + 1
        return x + torch.zeros(count).sum()


class FrozenSizeOfBranch(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            return x + 1
        return x - 1


MISMATCHED: list[tuple[type[Net], str, str, str, str]] = [
    (Float64Kernel, "trace", "", "no kernel of Softplus for this dtype", "precision='fp32'"),
    (FrozenSize, "trace", "int(x.shape[0])", "is fixed to 6 in the graph", "not from constants"),
    (InvalidGraph, "script", "", "a graph that is not valid", "another core"),
    (FrozenSizeOfBranch, "trace", "if x.shape[0] > 2:", "the tracer kept", "without int()"),
    (Branch, "trace", "if x.sum() > 0:", "the tracer kept", "torch.where"),
]


def mismatch(module: nn.Module, core: str, folder: Path) -> tuple[VerificationError, str]:
    with export_context(), captured_output() as printed:
        model = CORES[core].export(asked_for(module))
    path = folder / "model.onnx"
    ir.save(model, path)
    with pytest.raises(VerificationError, match=r".") as caught:
        verify(path, module, {"x": X.abs()})
    return caught.value, printed.text


@pytest.mark.parametrize(
    ("net", "core", "line", "why", "advice"), MISMATCHED, ids=lambda v: getattr(v, "__name__", None)
)
def test_a_wrong_model_is_explained_and_the_fact_kept(
    net: type[Net], core: str, line: str, why: str, advice: str, tmp_path: Path
) -> None:
    error, printed = mismatch(net(), core, tmp_path)
    reason = explain_mismatch(error, core, printed)
    assert reason.startswith(str(error).rstrip("."))
    assert why in reason
    assert advice in reason
    assert (HERE in reason) == bool(line)
    assert line in reason


def test_what_torch_prints_past_python_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    request = asked_for(Operator())
    with captured_output() as printed:
        print("from Python")  # noqa: T201
        os.write(1, b"from C\n")
        warnings.warn("a warning", stacklevel=1)
        with pytest.raises(Exception, match="linalg_eigvals"):
            TraceCore().export(request)
    assert capfd.readouterr() == ("", "")
    for text in ("from Python", "from C", "UserWarning: a warning", "aten::linalg_eigvals"):
        assert text in printed.text


def test_every_class_has_a_name_of_its_own_and_says_what_to_do() -> None:
    table = (*FAILURES, *MISMATCHES)
    assert len({entry.name for entry in FAILURES}) == len(FAILURES)
    assert len({entry.name for entry in MISMATCHES}) == len(MISMATCHES)
    assert all(entry.advice and not entry.advice.endswith(".") for entry in table)


class Spectral(pl.LightningModule):
    """No core can export it; its properties that need a trainer raise on the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x)
        return torch.linalg.eigvals(y.transpose(1, 2) @ y).real

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_lightning_module_that_fails_in_training_is_repeated_by_the_script(
    tmp_path: Path,
) -> None:
    rows = torch.utils.data.TensorDataset(torch.randn(8, 5, 4))
    callback = OnnxExport(core="torchscript")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), callback, epochs=1)
    trainer.fit(Spectral(), torch.utils.data.DataLoader(rows, batch_size=4))
    assert not callback.reports[-1].ok
    (folder,) = tmp_path.rglob("*.onnx.failed")
    assert (folder / "module.pt").is_file(), (folder / "reproduce.py").read_text()[:600]
    result = subprocess.run(
        [sys.executable, str(folder / "reproduce.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "linalg_eigvals" in result.stdout + result.stderr
