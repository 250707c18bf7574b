"""Whatever a module is called with and whatever it gives comes out, from training alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import onnxruntime as ort
import pytest
import torch
import zoo
from torch import nn

from onnxport import Example, ExportError, Inputs, OnnxExport, export

if TYPE_CHECKING:
    from pathlib import Path

    from onnxport import ExportReport

pytestmark = pytest.mark.integration


def trained(root: Path, module: Any, **options: Any) -> ExportReport:
    callback = OnnxExport(**{"core": "trace"} | options)
    trainer = zoo.trainer(root, zoo.checkpoints(root), callback, epochs=1)
    trainer.fit(module, zoo.loader())
    (report,) = callback.reports
    assert report.error is None
    return report


class Growing(torch.utils.data.IterableDataset[torch.Tensor]):
    """Gives longer rows in each epoch but the first two."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        length = 5 + max(0, self.epoch - 2)
        return (torch.randint(0, 20, (length,)) for _ in range(12))


class Tokens(pl.LightningModule):
    """Embeds rows of tokens of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).mean(1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_size_that_a_later_epoch_shows_is_in_the_model(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    trainer = zoo.trainer(tmp_path, zoo.checkpoints(tmp_path, save_top_k=-1), callback, epochs=4)
    trainer.fit(Tokens(), torch.utils.data.DataLoader(Growing(), 4))
    first, *_, last = callback.reports
    assert [set(report.dynamic_axes["tokens"]) for report in (first, last)] == [{0}, {0, 1}]


def test_a_module_whose_forward_is_never_called_exports_the_child_that_got_the_batch(
    tmp_path: Path,
) -> None:
    report = trained(tmp_path, zoo.NoForward(zoo.cnn()))
    assert report.target == "net"
    assert report.dynamic_axes == {"input": {0: "batch"}, "output": {0: "batch"}}


def test_a_module_without_forward_exports_its_backbone_not_its_loss(tmp_path: Path) -> None:
    report = trained(tmp_path, zoo.OnlySteps())
    assert report.target == "backbone"
    names = {value.name for value in onnx_graph(report).initializer}
    assert "backbone.5.weight" in names


@pytest.mark.parametrize("core", ["dynamo", "trace"])
def test_dicts_keywords_none_integers_and_named_tuples(core: str, tmp_path: Path) -> None:
    report = trained(tmp_path, zoo.Structured(), core=core)
    assert [(spec.name, spec.dtype, spec.shape) for spec in report.inputs] == [
        ("image", "float32", ("batch", 1, 8, 8)),
        ("kind", "int64", ("batch",)),
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in report.outputs] == [
        ("logits", "float32", ("batch", 3)),
        ("label", "int64", ("batch",)),
        ("sizes_0", "float32", ("batch",)),
    ]
    session = ort.InferenceSession(report.path)
    feeds = {"image": np.zeros((11, 1, 8, 8), np.float32), "kind": np.zeros(11, np.int64)}
    assert [output.shape[0] for output in session.run(None, feeds)] == [11, 11, 11]


def test_a_chosen_target_and_chosen_names(tmp_path: Path) -> None:
    chosen = Inputs(names=("pixels",), output_names=("scores",), dynamic_axes={"pixels": {0: "n"}})
    report = trained(tmp_path, zoo.Classifier(zoo.cnn()), target="net", inputs=chosen)
    assert report.target == "net"
    assert report.dynamic_axes == {"pixels": {0: "n"}, "scores": {0: "n"}}


def test_an_example_from_the_user_is_used_instead_of_observation(tmp_path: Path) -> None:
    given = Inputs(example=torch.randn(3, 1, 8, 8))
    report = trained(tmp_path, zoo.Classifier(zoo.cnn()), inputs=given)
    assert {check.sizes["batch"] for check in report.checks} == {1, 2, 3, 5}


def test_calls_of_other_sizes_than_a_static_axis_has_are_said_and_left_out(tmp_path: Path) -> None:
    net, calls = nn.GRU(4, 2, batch_first=True), [torch.randn(2, 5, 4), torch.randn(3, 7, 4)]
    static = Inputs(names=("x",), dynamic_axes={"x": [0]})
    report = export(net, calls, tmp_path / "m.onnx", inputs=static, core="trace")
    assert report.inputs[0].shape == ("batch", 5, 4)
    assert any("1 of 2 calls" in text and "axis 1 of 'x'" in text for text in report.warnings)


def test_batches_of_one_row_still_give_a_dynamic_batch(tmp_path: Path) -> None:
    callback = OnnxExport(core="trace")
    data = torch.utils.data.DataLoader(zoo.Rows(3), batch_size=1)
    module = zoo.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    zoo.trainer(tmp_path, zoo.checkpoints(tmp_path), callback, epochs=1).fit(module, data)
    assert callback.reports[0].dynamic_axes["image"] == {0: "batch"}


def test_a_batch_as_large_as_the_image_is_not_mistaken_for_it(tmp_path: Path) -> None:
    report = export(zoo.cnn(), torch.randn(8, 1, 8, 8), tmp_path / "model.onnx", core="trace")
    assert report.dynamic_axes == {"input": {0: "batch"}, "output": {0: "batch"}}


def test_sizes_that_varied_between_calls_are_dynamic(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids) * mask.unsqueeze(-1))

    calls = [
        Example((torch.randint(50, (rows, length)), torch.ones(rows, length)))
        for rows, length in ((4, 7), (4, 9), (3, 5))
    ]
    report = export(Tagger(), calls, tmp_path / "model.onnx")
    assert report.dynamic_axes == {
        "ids": {0: "batch", 1: "sequence"},
        "mask": {0: "batch", 1: "sequence"},
        "output": {0: "batch", 1: "sequence"},
    }
    assert {check.sizes["sequence"] for check in report.checks} >= {5, 7, 9}


def test_a_model_without_batch_axis_is_static_and_says_so(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    report = export(Table(), torch.randn(4, 6), tmp_path / "model.onnx", core="trace")
    assert report.dynamic_axes == {}
    assert "No batch axis was found" in report.warnings[0]


def test_rows_that_depend_on_each_other_are_reported(tmp_path: Path) -> None:
    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x - x.mean(0))

    report = export(Centre(), torch.randn(4, 6), tmp_path / "model.onnx", core="trace")
    assert report.dynamic_axes["x"] == {0: "batch"}
    assert "Rows of a batch depend on each other" in report.warnings[0]


class GrowingTable(nn.Module):
    """Keeps a table of positions that is made anew when a longer call comes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("table", None, persistent=False)

    def positions(self, length: int) -> torch.Tensor:
        if self.table is None or self.table.shape[0] < length:
            places = torch.arange(length)
            self.table = -(places[None] - places[:, None]).abs() * 0.1
        return self.table[:length, :length]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.positions(x.shape[1]) @ x


@pytest.mark.parametrize("seen_before", [0, 9, 40])
def test_a_table_that_has_grown_is_no_bound_of_the_model(seen_before: int, tmp_path: Path) -> None:
    module = GrowingTable().eval()
    if seen_before:
        module(torch.randn(1, seen_before, 6))
    calls = [torch.randn(3, 5, 6), torch.randn(3, 8, 6)]
    report = export(module, calls, tmp_path / "model.onnx")
    session = ort.InferenceSession(report.path)
    free = report.dynamic_axes["x"].get(1) == "sequence"
    assert free or "No core could keep sequence" in " ".join(report.warnings)
    for length in (2, 8, 23, 50, 100) if free else ():
        x = torch.randn(2, length, 6)
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.allclose(found, module(x).detach().numpy(), atol=1e-4)
    assert free or seen_before == 40


def test_what_a_trace_kept_is_said(tmp_path: Path) -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.abs().max() > 1e6:
                return self.head(x * 0)
            return self.head(x)

    report = export(Careful(), torch.randn(4, 6), tmp_path / "model.onnx", core="trace")
    assert "no rows or sizes of the proof decided otherwise" in report.warnings[-1]
    assert "if x.abs().max() > 1e6:" in report.warnings[-1]
    # Where a core can keep the branch, the trace has to wait, and does not win.
    report = export(Careful(), torch.randn(4, 6), tmp_path / "other.onnx", core="torchscript")
    assert [(a.core, a.ok) for a in report.attempts] == [("trace", False), ("script", True)]
    assert "Cores that keep control flow are tried first" in report.attempts[0].reason
    x = torch.full((3, 6), 1e7)
    (found,) = ort.InferenceSession(report.path).run(None, {"x": x.numpy()})
    assert np.allclose(found, found[0])
    assert np.abs(found).max() < 10


def test_a_trace_that_had_to_wait_in_vain_wins_and_is_trusted_from_then_on(tmp_path: Path) -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = [lambda y: y * 0]  # no lambdas in TorchScript
            if x.abs().max() > 1e6:
                return self.head(keep[0](x))
            return self.head(x)

    module = Careful()
    cores = []
    for name in ("first.onnx", "second.onnx"):
        report = export(module, torch.randn(4, 6), tmp_path / name, core="torchscript")
        assert report.core == "trace"
        assert "if x.abs().max() > 1e6:" in report.warnings[-1]
        cores.append([attempt.core for attempt in report.attempts])
    assert cores == [["trace", "script", "trace"], ["trace"]]


def test_a_decision_on_a_short_row_is_not_kept(tmp_path: Path) -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            y = self.head(x)
            if (lengths - 1).min() == 0:
                y = y + 1
            return y

    call = (torch.randn(4, 6), torch.tensor([5, 4, 3, 6]))
    with pytest.raises(ExportError, match="lowered rows"):
        export(Lengths(), call, tmp_path / "model.onnx", core="trace")


def test_sequence_first_models_get_their_batch_axis(tmp_path: Path) -> None:
    class Rnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    report = export(Rnn(), torch.randn(7, 4, 6), tmp_path / "model.onnx", core="torchscript")
    assert report.dynamic_axes == {"x": {1: "batch"}, "output": {1: "batch"}}


def onnx_graph(report: ExportReport) -> Any:
    import onnx

    return onnx.load(report.path).graph


def test_what_failed_at_a_call_that_was_seen_is_not_tried_again(tmp_path: Path) -> None:
    class Steps(nn.Module):
        """Counts steps in a way that no core can follow."""

        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = [lambda y: y.tanh()]  # no lambdas in TorchScript
            state = x[:, 0]
            for step in range(int(x.shape[1])):
                state = keep[0](self.cell(state) + x[:, step])
            return state

    calls = [torch.randn(4, 5, 6), torch.randn(4, 8, 6)]
    report = export(Steps(), calls, tmp_path / "model.onnx", core="torchscript")
    assert report.dynamic_axes["x"] == {0: "batch"}
    assert "No core could keep sequence dynamic" in " ".join(report.warnings)
    failed = [(attempt.core, attempt.variant) for attempt in report.attempts if not attempt.ok]
    assert failed == [("trace", ""), ("script", "")]


def test_the_statistics_of_a_norm_are_no_table_to_outgrow(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 900, 1), nn.BatchNorm2d(900), nn.Conv2d(900, 2, 1)).eval()
    calls = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 12, 12)]
    report = export(net, calls, tmp_path / "model.onnx", core="trace")
    assert report.dynamic_axes["input"] == {0: "batch", 2: "height", 3: "width"}


def test_a_loop_that_collects_its_steps_keeps_their_number_free(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.new_zeros(x.shape[0], 4)
            states = []
            for step in range(x.shape[1]):
                state = self.cell(x[:, step], state)
                states.append(state)
            return torch.stack(states, dim=1)

    calls = [torch.randn(4, 5, 6), torch.randn(4, 8, 6)]
    report = export(Loop().eval(), calls, tmp_path / "model.onnx", core="torchscript")
    assert (report.core, report.attempts[-1].variant) == ("script", "plain cells")
    assert report.dynamic_axes["x"] == {0: "batch", 1: "sequence"}
