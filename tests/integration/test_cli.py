"""The command line: what a person does by hand with checkpoints and models that are there."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow import MlflowClient
from servers import free_port
from torch import nn
from typer.testing import CliRunner

import onnxport
from onnxport.cli import _app
from onnxport.errors import ConfigurationError
from onnxport.pipeline.report_files import read_report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SOURCE = """
import torch, lightning.pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, hidden=8):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def training_step(self, batch, _):
        return self.body(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val_loss", self.body(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WithForward(Net):
    def forward(self, x):
        return self.body(x)

    def validation_step(self, batch, _):
        self.log("val_loss", self(batch[0]).square().mean())


class Data(pl.LightningDataModule):
    def setup(self, stage):
        self.rows = TensorDataset(torch.randn(32, 4))

    def train_dataloader(self):
        return DataLoader(self.rows, 8)

    val_dataloader = train_dataloader


class Plain(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.table = nn.Embedding(4, hidden)

    def forward(self, ids):
        return self.table(ids).mean(1)


class Scaled(nn.Module):
    def __init__(self, hidden=2, scale=None):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, hidden), 1.0 if scale is None else float(scale)

    def forward(self, x):
        return self.layer(x) * self.scale


class ScaledNet(pl.LightningModule):
    def __init__(self, scale):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) * self.hparams.scale


class Fails(WithForward):
    def forward(self, x):
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.jit.is_scripting():
            raise RuntimeError("never exports")
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module's file and the checkpoints of three epochs."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_nets.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    import cli_nets

    pl.seed_everything(0, verbose=False)
    saves = ModelCheckpoint(folder / "ck", save_top_k=-1, monitor="val_loss")
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves],
    )
    trainer.fit(cli_nets.WithForward(hidden=6), datamodule=cli_nets.Data())
    plain = cli_nets.Plain(3)
    content = {"state_dict": plain.state_dict(), "hyper_parameters": {"hidden": 3, "lr": 0.1}}
    torch.save(content, folder / "plain.ckpt")
    return folder


@pytest.fixture
def path_of_imports(trained: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(trained))
    yield
    sys.path[:] = before


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(_app(), [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return str(result.output)


def said(*words: object, code: int = 0) -> Any:
    """Return what a command prints as JSON."""
    result = CliRunner().invoke(_app(), [*(str(word) for word in words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def first(trained: Path) -> Path:
    return next(iter(sorted((trained / "ck").glob("epoch=0*.ckpt"))))


SHAPE = ("--core", "trace", "--shape", "8x4")


def module(trained: Path, name: str = "WithForward") -> tuple[str, str]:
    return ("--module", f"{trained / 'cli_nets.py'}:{name}")


# --- export -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("path_of_imports")
def test_one_checkpoint(trained: Path, tmp_path: Path) -> None:
    checkpoint = first(trained)
    (report,) = said(
        "export", checkpoint, "--module", "cli_nets:WithForward", *SHAPE, "--output", tmp_path
    )
    path = tmp_path / f"{checkpoint.stem}.onnx"
    assert report["ok"]
    assert report["path"] == str(path)
    assert report["global_step"] == 4
    assert set(report["metrics"]) == {"val_loss"}
    held = read_report(path)
    assert held is not None
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert held.weights_sha256 == onnxport.weights_sha256(state)


def test_a_folder_is_one_export_and_refreshes(trained: Path, tmp_path: Path) -> None:
    options = (trained / "ck", *module(trained), *SHAPE, "--output", tmp_path, "--workers", 0)
    text = run("export", *options)
    assert "3 of 3 checkpoints have a proven model." in text
    reports = [read_report(path) for path in sorted(tmp_path.glob("*.onnx"))]
    assert [report.how for report in reports if report] == ["export", "refresh", "refresh"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.onnx")}
    run("export", *options)  # they are there already
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.onnx")} == before
    page = said("report", tmp_path)
    assert page["monitor"] == "val_loss"  # what was watched when they were saved
    assert page["best"] in {report.path for report in reports if report}
    run("export", *options, "--again")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.onnx")} != before


@pytest.mark.worker
def test_processes_share_a_folder(trained: Path, tmp_path: Path) -> None:
    options = (*module(trained), *SHAPE, "--output", tmp_path, "--workers", 2)
    reports = said("export", trained / "ck", *options)
    assert [report["ok"] for report in reports] == [True] * 3
    assert sorted(report["how"] for report in reports) == ["export", "export", "refresh"]


@pytest.mark.parametrize("name", ["Net", "WithForward"])
def test_a_data_module_shows_what_is_called(name: str, trained: Path, tmp_path: Path) -> None:
    data = ("--datamodule", f"{trained / 'cli_nets.py'}:Data", "--core", "trace")
    options = (*module(trained, name), *data, "--output", tmp_path)
    (report,) = said("export", first(trained), *options)
    assert report["target"] == ("body" if name == "Net" else "")
    assert report["inputs"][0]["shape"] == ["batch", 4]


def test_a_plain_module_and_a_file_with_an_example(trained: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "example.npz", ids=np.array([[0, 1], [2, 3]]))
    torch.save({"ids": torch.tensor([[0, 1], [2, 3]])}, tmp_path / "example.pt")
    np.save(tmp_path / "example.npy", np.array([[0, 1], [2, 3]]))
    plain = ("export", trained / "plain.ckpt", *module(trained, "Plain"), "--core", "trace")
    for kind in ("npz", "pt", "npy"):
        options = ("--example", tmp_path / f"example.{kind}", "--output", tmp_path / kind)
        (report,) = said(*plain, *options)
        assert [spec["name"] for spec in report["inputs"]] == ["ids"]
    (report,) = said(*plain, "--shape", "ids=4x5:int64", "--output", tmp_path / "shape")
    assert report["inputs"][0]["dtype"] == "int64"


def test_a_hyperparameter_can_be_set(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "plain.ckpt", weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "bare.ckpt")
    plain = ("export", tmp_path / "bare.ckpt", *module(trained, "Plain"), "--core", "trace")
    text = run(*plain, "--shape", "4x5:int64", code=2)
    assert "--set name=value" in text
    run(*plain, "--shape", "4x5:int64", "--set", "hidden=3")
    assert (tmp_path / "bare.onnx").exists()


def test_each_checkpoint_has_its_own_hyperparameters(trained: Path, tmp_path: Path) -> None:
    layer = nn.Linear(4, 2)
    state = {f"layer.{name}": value for name, value in layer.state_dict().items()}
    scales = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0]), "c": 5.0}
    for name, scale in scales.items():
        content = {"state_dict": state, "hyper_parameters": {"scale": scale}}
        content |= {"pytorch-lightning_version": pl.__version__, "epoch": 0, "global_step": 0}
        torch.save(content, tmp_path / f"{name}.ckpt")
    options = (*module(trained, "ScaledNet"), *SHAPE, "--workers", 0)
    run("export", tmp_path, *options)
    rows = torch.randn(3, 4)
    for name, scale in scales.items():
        session = ort.InferenceSession(tmp_path / f"{name}.onnx")
        (found,) = session.run(None, {"x": rows.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), layer(rows) * scale)


def test_a_hyperparameter_that_cannot_be_read_has_no_default(trained: Path, tmp_path: Path) -> None:
    state = {f"layer.{name}": value for name, value in nn.Linear(4, 2).state_dict().items()}
    for name, scale in {"object": Six(), "tensor": torch.ones(2)}.items():
        content = {"state_dict": state, "hyper_parameters": {"scale": scale, "more": Six()}}
        torch.save(content, tmp_path / f"{name}.ckpt")
        plain = ("export", tmp_path / f"{name}.ckpt", *module(trained, "Scaled"), *SHAPE)
        text = " ".join(run(*plain, code=2).split())
        assert "hyperparameter 'scale'" in text
        run(*plain, "--set", "scale=2")


def test_folders_below_have_models_of_the_same_name(trained: Path, tmp_path: Path) -> None:
    for version, hidden in enumerate((3, 3, 4)):
        folder = tmp_path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        content = torch.load(trained / "plain.ckpt", weights_only=True)
        content["state_dict"]["table.weight"] = torch.randn(4, hidden)
        content["hyper_parameters"]["hidden"] = hidden
        torch.save(content, folder / "last.ckpt")
    plain = (*module(trained, "Plain"), "--core", "trace", "--shape", "4x5:int64")
    for workers in (0, 1):
        output = tmp_path / f"models{workers}"
        options = (*plain, "--output", output, "--workers", workers)
        reports = said("export", tmp_path / "logs", *options)
        assert [report["ok"] for report in reports] == [True] * 3
        names = sorted(str(path.relative_to(output)) for path in output.rglob("*.onnx"))
        assert names == [f"version_{version}/last.onnx" for version in range(3)]


def test_a_model_of_other_weights_is_made_anew(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "plain.ckpt", weights_only=True)
    checkpoint, model = tmp_path / "p.ckpt", tmp_path / "p.onnx"
    plain = ("export", checkpoint, *module(trained, "Plain"), "--core", "trace")
    for _ in range(2):
        content["state_dict"]["table.weight"] = torch.randn(4, 3)
        torch.save(content, checkpoint)
        os.utime(checkpoint, (1, 1))  # older than the model, as a copy may be
        (report,) = said(*plain, "--shape", "4x5:int64")
        assert report["weights_sha256"] == onnxport.weights_sha256(content["state_dict"])
    assert model.exists()


def test_a_damaged_checkpoint_holds_up_no_other(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"damaged")
    (tmp_path / "b.ckpt").write_bytes((trained / "plain.ckpt").read_bytes())
    plain = (*module(trained, "Plain"), "--core", "trace", "--shape", "4x5:int64")
    reports = said("export", tmp_path, *plain, "--workers", 0, code=1)
    assert [report["ok"] for report in reports] == [False, True]


def test_what_does_not_export_ends_with_one(trained: Path, tmp_path: Path) -> None:
    options = (*module(trained, "Fails"), *SHAPE, "--output", tmp_path)
    text = run("export", first(trained), *options, code=1)
    assert "no model. No core produced a model" in text
    assert not list(tmp_path.glob("*.onnx"))


def test_mlflow_gets_the_models(trained: Path, tmp_path: Path, store: str) -> None:
    options = (*module(trained), *SHAPE, "--output", tmp_path, "--workers", 0)
    server = ("--tracking-uri", store, "--register", "old", "--experiment", "last year")
    reports = said("export", trained / "ck", *options, *server)
    assert [report["tracking"]["missing"] for report in reports] == [""] * 3
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("last year").experiment_id
    (run_of_all,) = client.search_runs([experiment])
    assert run_of_all.info.status == "FINISHED"
    assert len(client.search_logged_models([experiment])) == 3
    best = min(reports, key=lambda report: report["metrics"]["val_loss"])
    champion = client.get_model_version_by_alias("old", "champion")
    assert int(champion.version) == best["tracking"]["version"]
    # What it holds is not told again.
    run("export", trained / "ck", *options, *server)
    assert len(client.search_logged_models([experiment])) == 3
    assert len(client.search_runs([experiment])) == 1


def test_a_server_that_is_down_is_told_later(trained: Path, tmp_path: Path, store: str) -> None:
    options = (*module(trained), *SHAPE, "--output", tmp_path)
    down = f"http://127.0.0.1:{free_port()}"
    text = run("export", first(trained), *options, "--tracking-uri", down, code=1)
    assert "onnxport sync" in text
    assert list(tmp_path.glob("*.onnx"))
    run("export", first(trained), *options, "--tracking-uri", store)
    experiment = MlflowClient(store).get_experiment_by_name("onnxport").experiment_id
    assert len(MlflowClient(store).search_logged_models([experiment])) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Nothing says what the weights are of"),
        (("--module", "nothing"), "names nothing"),
        (("--module", "no_such_package:Net"), "raised ModuleNotFoundError"),
        (("--module", "no_such.py:Net"), "There is no file"),
        (("--module", "{nets}:Nope"), "its classes are"),
        (("--module", "{nets}:WithForward"), "Nothing says what WithForward.forward takes"),
        (("--module", "{nets}:WithForward", "--shape", "8 by 4"), "is no shape"),
        (("--module", "{nets}:WithForward", "--shape", "8x4", "--core", "x"), "core must be one"),
        (("--module", "{nets}:WithForward", "--example", "{nets}"), "holds no example"),
        (("--module", "{nets}:WithForward", "--set", "hidden"), "sets nothing"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    words: tuple[str, ...], message: str, trained: Path, tmp_path: Path
) -> None:
    given = [word.format(nets=trained / "cli_nets.py") for word in words]
    text = run("export", first(trained), *given, "--output", tmp_path, code=2)
    assert message in " ".join(text.split())
    assert "[OX" in text


def test_a_checkpoint_that_is_none(trained: Path, tmp_path: Path) -> None:
    assert "no checkpoint" in run("export", tmp_path / "x.ckpt", *module(trained), code=2)
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    assert "cannot be read" in run("export", tmp_path / "x.ckpt", *module(trained), code=2)


def test_objects_in_a_checkpoint_are_trusted_only_if_asked_for(
    trained: Path, tmp_path: Path
) -> None:
    content = torch.load(first(trained), weights_only=True)
    content["hyper_parameters"]["hidden"] = Six()
    torch.save(content, tmp_path / "object.ckpt")
    options = (*module(trained), *SHAPE, "--set", "hidden=6")
    assert "--trust-checkpoint" in run("export", tmp_path / "object.ckpt", *options, code=2)
    text = run("export", tmp_path / "object.ckpt", *options, "--trust-checkpoint")
    assert "can run any code" in text


class Six:
    """Of a class that torch does not know."""


# --- verify, inspect, diff, bench ------------------------------------------------------------


@pytest.fixture(scope="module")
def models(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    options = (*module(trained), *SHAPE, "--output", folder, "--workers", 0)
    run("export", trained / "ck", *options)
    return folder


def test_verify_by_the_hash_and_by_running(trained: Path, models: Path) -> None:
    (one, two, _), (checkpoint, *_) = sorted(models.glob("*.onnx")), sorted(trained.glob("ck/*"))
    assert "the hash of the weights is the same" in run("verify", one, checkpoint)
    found = said("verify", one, checkpoint, *module(trained), "--shape", "8x4")
    assert found["ok"]
    assert len(found["checks"]) > 3
    found = said("verify", two, checkpoint, code=1)
    assert not found["ok"]
    assert found["model"] != found["checkpoint"]
    assert "other weights" in run("verify", two, checkpoint, code=1)


def test_verify_of_a_model_that_says_nothing(trained: Path, models: Path, tmp_path: Path) -> None:
    (one, two, _), (checkpoint, *_) = sorted(models.glob("*.onnx")), sorted(trained.glob("ck/*"))
    for path in (one, two):
        model = onnx.load(path)
        del model.metadata_props[:]
        onnx.save(model, tmp_path / path.name)
    shape = (*module(trained), "--shape", "8x4")
    assert "does not say" in run("verify", tmp_path / one.name, checkpoint, code=1)
    assert "proven in" in run("verify", tmp_path / one.name, checkpoint, *shape)
    run("verify", tmp_path / two.name, checkpoint, *shape, code=1)


def test_inspect(models: Path) -> None:
    path = min(models.glob("*.onnx"))
    facts = said("inspect", path)
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert facts["parameters"] == 4 * 6 + 6 + 6 * 2 + 2
    assert facts["operators"] == {"Gemm": 2, "Relu": 1}
    assert facts["origin"]["checkpoint"] == f"{path.stem}.ckpt"
    text = run("inspect", path)
    assert "x: float32[batch, 4]" in text
    assert "weights_sha256" in text


def test_inspect_a_model_of_another_tool(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    example = torch.randn(2, 3, 8, 8)
    torch.onnx.export(net.eval(), (example,), tmp_path / "m.onnx", external_data=True)
    facts = said("inspect", tmp_path / "m.onnx")
    assert facts["origin"] == {}
    assert facts["bytes"] >= sum(value.nbytes for value in net.state_dict().values()) // 2
    assert "onnxport has not made it" in run("inspect", tmp_path / "m.onnx")
    assert "no ONNX model" in run("inspect", __file__, code=2)
    assert said("inspect", tmp_path / "none.onnx", code=2)["code"] == "OX100"


def test_diff(models: Path) -> None:
    one, two, _ = sorted(models.glob("*.onnx"))
    assert said("diff", one, one)["equal"]
    found = said("diff", one, two, code=1)
    assert found["same_graph"]
    names = {each["name"] for each in found["weights"]}
    assert names <= {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"}
    left, right = (dict(weights(path)) for path in (one, two))
    for each in found["weights"]:
        far = np.abs(left[each["name"]].astype(np.float64) - right[each["name"]]).max()
        assert each["max_abs"] == pytest.approx(far)
    assert "weights differ" in run("diff", one, two, code=1)


def weights(path: Path) -> list[tuple[str, np.ndarray[Any, Any]]]:
    model = onnx.load(path)
    return [(each.name, onnx.numpy_helper.to_array(each)) for each in model.graph.initializer]


def test_diff_of_graphs_and_interfaces(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    onnxport.export(net, torch.randn(8, 4), other, core="trace")
    found = said("diff", min(models.glob("*.onnx")), other, code=1)
    assert not found["same_graph"]
    assert found["operators"] == {"Relu": [1, 0], "Tanh": [0, 1]}
    assert any("output" in line for line in found["interface"])


def test_names_of_inner_values_make_no_difference(models: Path, tmp_path: Path) -> None:
    path = min(models.glob("*.onnx"))
    model = onnx.load(path)
    old = model.graph.node[0].output[0]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == old else name for name in names]
    onnx.save(model, tmp_path / "renamed.onnx")
    assert said("diff", path, tmp_path / "renamed.onnx")["equal"]


def test_bench(models: Path, trained: Path) -> None:
    path = min(models.glob("*.onnx"))
    found = said("bench", path, "--batch", 1, "--batch", 4, "--seconds", 0.01)
    assert [each["batch"] for each in found] == [1, 4]
    assert all(0 < each["p50"] <= each["p95"] and each["runs"] >= 5 for each in found)
    assert "CPUExecutionProvider" in run("bench", path, "--seconds", 0.01)
    one = first(trained)
    shown = ("--checkpoint", one, *module(trained), "--batch", 4, "--seconds", 0.01)
    found = said("bench", path, *shown)
    assert [each["name"] for each in found] == ["CPUExecutionProvider", "eager"]
    wrong = ("--checkpoint", one, *module(trained, "Net"))  # it has no forward of its own
    assert "does not run on the model's inputs" in run("bench", path, *wrong, code=2)
    assert "no symbolic size" in run("bench", path, "--size", "sequence=8", code=2)


# --- the same in Python ----------------------------------------------------------------------


def test_structures_that_differ_are_exported_each(tmp_path: Path) -> None:
    nets = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 3), "c": nn.Linear(4, 2)}
    for name, net in nets.items():
        torch.save({"state_dict": net.state_dict()}, tmp_path / f"{name}.ckpt")
    reports = onnxport.backfill(
        tmp_path, lambda path: nets[path.stem], torch.randn(8, 4), core="trace", workers=0
    )
    assert all(report.ok for report in reports)
    for (name, net), report in zip(nets.items(), reports, strict=True):
        assert report.weights_sha256 == onnxport.weights_sha256(net.state_dict())
        assert report.outputs[0].shape == ("batch", net.out_features), name


def test_one_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    net = nn.Linear(4, 2)
    for name in ("a", "c"):
        torch.save({"state_dict": net.state_dict()}, tmp_path / f"{name}.ckpt")
    torch.save({"state_dict": nn.Linear(5, 2).state_dict()}, tmp_path / "b.ckpt")
    (tmp_path / "d.ckpt").write_bytes(b"damaged")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "e.ckpt")

    def make(path: Path) -> nn.Module:
        if path.stem == "e":
            raise RuntimeError("of the user")
        return net

    told = []
    reports = onnxport.backfill(
        tmp_path, make, torch.randn(8, 4), core="trace", workers=0, tell=told.append
    )
    assert [report.ok for report in reports] == [True, False, True, False, False]
    assert told == reports
    assert "RuntimeError: of the user" in str(reports[4].error)
    assert "cannot be read" in str(reports[3].error)


@pytest.mark.parametrize(
    "wrong", [{"workers": -1}, {"workers": True}, {"target": {"a": "b"}}, {"core": "x"}]
)
def test_wrong_arguments(wrong: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(4, 2).state_dict()}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError):
        onnxport.backfill(tmp_path, nn.Linear(4, 2), torch.randn(8, 4), **wrong)


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no \.ckpt file"):
        onnxport.backfill(tmp_path, nn.Linear(4, 2), torch.randn(8, 4))
