"""The same graph with other weights: right for every kind of weight, or not used at all."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from onnxport.config import ExportOptions
from onnxport.exporter import writer
from onnxport.exporter.fingerprint import fingerprint
from onnxport.exporter.module_state import copy_module
from onnxport.exporter.ownership import read_metadata
from onnxport.exporter.weights import weights_sha256
from onnxport.pipeline import ExportJob, GivenModule, LiveReference, Pipeline, blueprint
from onnxport.tree import Example

if TYPE_CHECKING:
    from pathlib import Path

    from onnxport import ExportReport

pytestmark = pytest.mark.integration


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """One matrix as embedding and as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 600)
        self.head = nn.Linear(600, 600, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


class Scaled(nn.Module):
    """Starts with scales of one, biases of zero and equal weights, which an optimiser drops."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(6))
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.load_state_dict(self.first.state_dict())
        self.conv = nn.Conv1d(6, 6, 1)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x * self.scale + self.shift))
        return self.conv(x.unsqueeze(-1)).squeeze(-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


MODULES: dict[str, tuple[Any, torch.Tensor]] = {
    "recurrent": (Recurrent, torch.randn(4, 5, 6)),
    "tied": (Tied, torch.randint(0, 600, (4, 7))),
    "scaled": (Scaled, torch.randn(4, 6)),
    "attention": (Attention, torch.randn(4, 5, 8)),
    "convolutional": (convolutional, torch.randn(4, 1, 8, 8)),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(6, 3))), torch.randn(4, 6)),
    "half": (lambda: nn.Linear(6, 3).half(), torch.randn(4, 6).half()),
    "double": (lambda: nn.Linear(6, 3).double(), torch.randn(4, 6).double()),
    "bfloat16": (lambda: nn.Linear(6, 3).bfloat16(), torch.randn(4, 6).bfloat16()),
}


def changed(module: nn.Module, seed: int = 1) -> nn.Module:
    """Return a copy as further training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in {id(t): t for t in other.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
                tensor.add_(0.3 * noise)
    return other


def run(
    pipeline: Pipeline,
    module: nn.Module,
    x: torch.Tensor,
    path: Path,
    *,
    core: str = "auto",
    reference: LiveReference | None = None,
    **options: Any,
) -> ExportReport:
    return pipeline.run(
        ExportJob(
            source=GivenModule(copy_module(module).eval()),
            examples=(Example((x,)),),
            path=path,
            options=ExportOptions(core=core, **options),  # type: ignore[arg-type]
            fingerprint=fingerprint(module),
            reference=reference,
        )
    )


def assert_computes(path: Path, module: nn.Module, x: torch.Tensor) -> None:
    wide = copy_module(module).eval()
    if x.dtype is torch.bfloat16:
        wide, x = wide.float(), x.float()
    with torch.no_grad():
        expected = wide(x)
    session = ort.InferenceSession(path)
    actual = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    tolerance = 2e-2 if x.dtype is torch.float16 else 1e-4
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("core", ["dynamo", "trace"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] * (name in {"recurrent", "double"}))
        for name in MODULES
    ],
)
def test_other_weights_in_the_same_graph(name: str, core: str, tmp_path: Path) -> None:
    make, x = MODULES[name]
    module, pipeline = make(), Pipeline()
    first = run(pipeline, module, x, tmp_path / "0.onnx", core=core)
    assert (first.ok, first.how) == (True, "export"), first.error
    for number in (1, 2):
        module = changed(module, number)
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core=core)
        assert (report.ok, report.how, report.error) == (True, "refresh", None)
        path = tmp_path / f"{number}.onnx"
        onnx.checker.check_model(path)
        assert_computes(path, module, x)
        assert read_metadata(path)["weights_sha256"] == weights_sha256(module.state_dict())
        assert report.dynamic_axes == first.dynamic_axes


def test_a_refreshed_file_is_the_file_of_an_export(tmp_path: Path) -> None:
    module, other = convolutional(), changed(convolutional())
    x = torch.randn(4, 1, 8, 8)
    pipeline = Pipeline()
    run(pipeline, module, x, tmp_path / "first.onnx")
    run(pipeline, other, x, tmp_path / "refreshed.onnx")
    run(Pipeline(), other, x, tmp_path / "exported.onnx")
    files = [onnx.load(tmp_path / f"{name}.onnx") for name in ("refreshed", "exported")]
    weights = [{i.name: i.SerializeToString() for i in file.graph.initializer} for file in files]
    assert weights[0] == weights[1]
    nodes = [[node.op_type for node in file.graph.node] for file in files]
    assert nodes[0] == nodes[1]


def test_a_large_matrix_with_two_uses_is_stored_once(tmp_path: Path) -> None:
    make, x = MODULES["tied"]
    run(Pipeline(), make(), x, tmp_path / "tied.onnx", core="dynamo")
    assert (tmp_path / "tied.onnx").stat().st_size < 1.5 * 600 * 600 * 4


def test_external_data_are_refreshed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "EXTERNAL_DATA_BYTES", 100)
    module, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(4, 6)
    pipeline = Pipeline()
    for number in range(3):
        module = changed(module, number)
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core="trace")
        assert (report.ok, report.how) == (True, "refresh" if number else "export")
        assert (tmp_path / f"{number}.onnx.data").stat().st_size > 900
        assert_computes(tmp_path / f"{number}.onnx", module, x)


class Baked(nn.Module):
    """Takes a number out of a weight in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * float(self.gain)


def test_what_python_took_of_a_weight_makes_every_checkpoint_an_export(tmp_path: Path) -> None:
    module, pipeline = Baked(), Pipeline()
    for number in range(2):
        report = run(pipeline, module, torch.randn(4, 6), tmp_path / f"{number}.onnx", core="trace")
        assert (report.ok, report.how) == (True, "export")
        assert any("export of its own" in warning for warning in report.warnings)
        module = changed(module)


class Moody(nn.Module):
    """Computes with a number, a flag and a table that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.temperature, self.square, self.count = 1.0, False, 0
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.function = torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.net(x) / self.temperature + self.table
        return self.function(out * out if self.square else out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1.001),
        ("square", True),
        ("table", torch.full((3,), 1.01)),
        ("function", torch.tanh),
    ],
)
def test_what_is_no_weight_and_changed_leads_to_an_export(
    name: str, value: Any, tmp_path: Path
) -> None:
    module, x, pipeline = Moody(), torch.randn(4, 6), Pipeline()
    run(pipeline, module, x, tmp_path / "0.onnx", core="trace")
    setattr(module, name, value)
    report = run(pipeline, module, x, tmp_path / "1.onnx", core="trace")
    assert (report.ok, report.how) == (True, "export")
    assert "not right for this one" in report.attempts[0].reason
    assert_computes(tmp_path / "1.onnx", module, x)
    again = run(pipeline, changed(module), x, tmp_path / "2.onnx", core="trace")
    assert again.how == "refresh"


class Limited(nn.Module):
    """Cuts what is large; ordinary rows never are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.limit = 100.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.clamp(max=self.limit))


def test_a_change_that_ordinary_rows_do_not_show_is_seen_by_what_changed(tmp_path: Path) -> None:
    module, x, pipeline = Limited(), torch.randn(4, 6).clamp(-3, 3), Pipeline()
    run(pipeline, module, x, tmp_path / "0.onnx", core="trace")
    module.limit = 4.0
    report = run(pipeline, module, x, tmp_path / "1.onnx", core="trace")
    assert (report.ok, report.how) == (True, "export")
    assert_computes(tmp_path / "1.onnx", module, 8 * x)


@pytest.mark.parametrize("core", ["dynamo", "trace"])
def test_a_counter_that_no_run_looks_at_costs_no_export(core: str, tmp_path: Path) -> None:
    module, x, pipeline = Moody(), torch.randn(4, 6), Pipeline()
    for number in range(5):
        module.count = number
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core=core)
        assert report.how == ("refresh" if number else "export")


class Counting(Moody):
    """Looks at its counter, to no avail."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.count < 100 else x


@pytest.mark.parametrize("core", [pytest.param("dynamo", marks=pytest.mark.exhaustive), "trace"])
def test_a_counter_is_watched_until_it_has_made_no_other_graph_three_times(
    core: str, tmp_path: Path
) -> None:
    module, x, pipeline = Counting(), torch.randn(4, 6), Pipeline()
    hows = []
    for number in range(6):
        module.count = number
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core=core)
        hows.append(report.how)
        if number in {1, 2, 3}:
            assert "count changed" in report.attempts[0].reason
    assert hows == [*["export"] * 4, *["refresh"] * 2]


class Gated(Limited):
    """Cuts only once a flag is set."""

    cuts = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.cuts else self.net(x)


def test_what_no_run_looked_at_is_watched_again_when_one_does(tmp_path: Path) -> None:
    module, x, pipeline = Gated(), torch.randn(4, 6).clamp(-3, 3), Pipeline()
    hows = []
    for number in range(9):
        module.limit, module.cuts = 1000.0 - 100 * number, number > 4
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core="trace")
        hows.append(report.how)
        assert_computes(tmp_path / f"{number}.onnx", module, 1e4 * x)
    assert hows == ["export", *["refresh"] * 4, *["export"] * 4]


class Fixed(Moody):
    """Refuses to become an instance of another class, so that nobody can watch it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("fixed")
        super().__setattr__(name, value)


def test_where_nobody_can_watch_all_counts(tmp_path: Path) -> None:
    module, x, pipeline = Fixed(), torch.randn(4, 6), Pipeline()
    for number in range(2):
        module.count = number
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core="trace")
        assert (report.ok, report.how) == (True, "export")


def test_a_number_that_no_row_reaches_is_never_left_as_it_was(tmp_path: Path) -> None:
    module, x, pipeline = Limited(), torch.randn(4, 6).clamp(-3, 3), Pipeline()
    for number in range(7):
        module.limit = 1000.0 - 100 * number
        report = run(pipeline, module, x, tmp_path / f"{number}.onnx", core="trace")
        assert (report.ok, report.how) == (True, "export")
        assert_computes(tmp_path / f"{number}.onnx", module, 1e4 * x)


@pytest.mark.parametrize("change", ["grown", "pruned", "resized"])
def test_another_set_of_weights_leads_to_an_export(change: str, tmp_path: Path) -> None:
    module, x, pipeline = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6), Pipeline()
    run(pipeline, module, x, tmp_path / "0.onnx", core="trace")
    if change == "grown":
        module.append(nn.Linear(3, 3))
    elif change == "pruned":
        prune.random_unstructured(module[0], "weight", 0.5)
    else:
        module[0] = nn.Linear(6, 5)
    report = run(pipeline, module, x, tmp_path / "1.onnx", core="trace")
    assert (report.ok, report.how) == (True, "export")
    assert "e.g." in report.attempts[0].reason
    assert_computes(tmp_path / "1.onnx", module, x)


def test_a_longer_call_than_the_model_takes_leads_to_an_export(tmp_path: Path) -> None:
    module, pipeline = Attention(), Pipeline()
    calls = [torch.randn(4, 5, 8), torch.randn(4, 9, 8)]
    reports = []
    for number in (1, 2):
        job = ExportJob(
            source=GivenModule(copy.deepcopy(module).eval()),
            examples=tuple(Example((call,)) for call in calls[:number]),
            path=tmp_path / f"{number}.onnx",
            options=ExportOptions(core="dynamo"),
            fingerprint=fingerprint(module),
        )
        reports.append(pipeline.run(job))
    assert [report.how for report in reports] == ["export", "export"]
    assert "does not take" in reports[1].attempts[0].reason
    assert len(reports[1].dynamic_axes["x"]) == 2


class NeedsTwo(nn.Module):
    """Takes no batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] < 2:
            raise ValueError("two rows at least")
        return self.net(x)


class Mixed(nn.Module):
    """Attention between the rows of a batch: one row alone says nothing of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.query(x) @ self.key(x).T).softmax(-1) @ self.value(x)


@pytest.mark.parametrize(
    ("limit", "module", "rows", "sizes"),
    [
        (10**9, nn.Linear(6, 3), 2, [1, 2, 5]),
        (0, nn.Linear(6, 3), 1, [1]),
        (0, NeedsTwo(), 2, [2]),
        (0, Mixed(), 2, [2]),
    ],
    ids=["small", "large", "large, no batch of one", "large, rows interact"],
)
def test_one_row_of_a_large_model_passes_all_weights(
    limit: int,
    module: nn.Module,
    rows: int,
    sizes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blueprint, "LARGE_BYTES", limit)
    pipeline, x = Pipeline(), torch.randn(4, 6)
    assert run(pipeline, module, x, tmp_path / "0.onnx").ok
    assert pipeline.blueprint is not None
    example = pipeline.blueprint.example
    assert example is not None
    assert example.args[0].shape == (rows, 6)
    other = changed(module)
    with torch.no_grad():
        outputs = (other(example.args[0]),)
    live = LiveReference(example=example, outputs=outputs, rtol=1e-4, exact=True)
    report = run(pipeline, other, x, tmp_path / "1.onnx", reference=live)
    assert (report.ok, report.how) == (True, "refresh")
    assert sorted(check.sizes["batch"] for check in report.checks) == sizes
