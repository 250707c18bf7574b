"""Checkpoints on remote file systems have their models there, beside them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import fsspec
import onnxruntime
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint

import onnxport
from onnxport import OnnxExport
from onnxport.callbacks.remote import RemoteModels
from onnxport.exporter.ownership import read_metadata
from onnxport.report import ExportReport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def bucket() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    yield "memory://runs/first"
    system.rm("/", recursive=True)


def stems(url: str, suffix: str) -> set[str]:
    system, path = fsspec.core.url_to_fs(url)
    names = [name.rpartition("/")[2] for name in system.find(path)]
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def train(root: Path, url: str, **options: Any) -> tuple[OnnxExport, list[float]]:
    saves = ModelCheckpoint(
        dirpath=url, save_top_k=1, save_last=True, monitor="val_loss", filename="{epoch}"
    )
    export = OnnxExport(core="trace", **options)
    module = zoo.Classifier(zoo.cnn())
    trainer = zoo.trainer(root, saves, export, epochs=4)
    trainer.fit(module, zoo.loader(), zoo.loader(shuffle=False))
    return export, module.losses


def assert_models_are_beside_their_checkpoints(url: str, folder: Path) -> None:
    system, path = fsspec.core.url_to_fs(url)
    checkpoints = stems(url, ".ckpt")
    assert checkpoints
    assert stems(url, ".onnx") == stems(url, ".onnx.json") == checkpoints
    for stem in checkpoints:
        with fsspec.open(f"{url}/{stem}.ckpt") as file:
            state = torch.load(file, weights_only=False)["state_dict"]
        model = folder / "fetched.onnx"
        system.get_file(f"{path}/{stem}.onnx", str(model))
        assert read_metadata(model)["weights_sha256"] == onnxport.weights_sha256(state)
        onnxruntime.InferenceSession(model)
        report = ExportReport.from_json(system.cat_file(f"{path}/{stem}.onnx.json").decode())
        assert report.path == f"{url}/{stem}.onnx"


@pytest.mark.worker
@pytest.mark.parametrize("background", [True, False])
def test_models_lie_beside_their_checkpoints(background: bool, bucket: str, tmp_path: Path) -> None:
    export, _ = train(tmp_path, bucket, background=background)
    assert [report.error for report in export.reports if not report.ok] == []
    assert_models_are_beside_their_checkpoints(bucket, tmp_path)
    assert not list(tmp_path.parent.rglob("memory:*"))  # a URL is no local name


def test_variants_lie_beside_their_models(bucket: str, tmp_path: Path) -> None:
    system, path = fsspec.core.url_to_fs(bucket)
    system.makedirs(path)
    system.pipe_file(f"{path}/epoch=3.int8.onnx", b"of somebody else")
    export, _ = train(tmp_path, bucket, variants={"fp16": 0.5, "int8": 0.9})
    kept = {str(report.checkpoint): report for report in export.reports if report.ok}
    left = stems(bucket, ".onnx") - {"epoch=3.int8"}
    checkpoints = stems(bucket, ".ckpt")
    assert left == {stem + end for stem in checkpoints for end in ("", ".fp16", ".int8")} - {
        "epoch=3.int8"
    }
    for stem in checkpoints:
        report = kept[f"{bucket}/{stem}.ckpt"]
        for variant in report.variants:
            if f"{stem}.{variant.name}" in left:
                assert variant.path == f"{bucket}/{stem}.{variant.name}.onnx"
                model = tmp_path / "fetched.onnx"
                system.get_file(f"{path}/{stem}.{variant.name}.onnx", str(model))
                assert model.stat().st_size == variant.bytes
                of_model = read_metadata(model)
                assert of_model["weights_sha256"] == report.weights_sha256
            else:
                assert variant.path is None
                assert "was not written by onnxport" in str(variant.error)
    assert system.cat_file(f"{path}/epoch=3.int8.onnx") == b"of somebody else"


def test_the_best_model_at_the_end(bucket: str, tmp_path: Path) -> None:
    export, _ = train(tmp_path, bucket, when="end")
    (report,) = export.reports
    assert report.ok, report.error
    assert str(report.path).startswith(bucket)
    assert len(stems(bucket, ".onnx")) == 1


def test_final_weights_go_to_a_remote_root(bucket: str, tmp_path: Path) -> None:
    export = OnnxExport(core="trace")
    trainer = zoo.trainer(bucket, export, enable_checkpointing=False)
    trainer.fit(zoo.Classifier(zoo.cnn()), zoo.loader())
    (report,) = export.reports
    assert report.ok, report.error
    assert report.path == f"{bucket}/epoch=2-step=6.onnx"
    assert stems(bucket, ".onnx") == {"epoch=2-step=6"}


def test_a_file_system_that_refuses_ends_no_training(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))
    opens = memory._open

    def refuses(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith(".onnx") and "w" in mode:
            raise PermissionError("not for you (injected)")
        return opens(self, path, mode, **options)

    monkeypatch.setattr(memory, "_open", refuses)
    export, losses = train(tmp_path, bucket)
    assert len(losses) == 4 * zoo.ROWS // zoo.BATCH
    assert export.reports
    for report in export.reports:
        assert "could not be put beside its checkpoint" in str(report.error)
        assert "PermissionError: not for you" in str(report.error)
    assert stems(bucket, ".onnx") == set()


def test_a_model_whose_checkpoint_went_while_it_was_copied_goes_too(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = RemoteModels(tmp_path)
    model = models.local(f"{bucket}/gone.onnx")
    report = onnxport.export(torch.nn.Linear(2, 1), torch.randn(3, 2), model, core="trace")
    put = models._put

    def put_and_removed(file: Path, url: str) -> None:
        put(file, url)
        model.unlink(missing_ok=True)

    monkeypatch.setattr(models, "_put", put_and_removed)
    assert models.deliver(report, model) is None
    assert stems(bucket, "") == set()


def test_a_transaction_of_the_trainer_is_left_alone(bucket: str, tmp_path: Path) -> None:
    """File systems are cached by fsspec, and a file system has one transaction."""
    models = RemoteModels(tmp_path)
    model = models.local(f"{bucket}/model.onnx")
    report = onnxport.export(torch.nn.Linear(2, 1), torch.randn(3, 2), model, core="trace")
    system, path = fsspec.core.url_to_fs(f"{bucket}/one.ckpt")
    with system.transaction:
        with system.open(path, "wb") as file:
            models.deliver(report, model)
            file.write(b"whole")
        assert not system.exists(path)
    assert system.cat_file(path) == b"whole"


def test_files_of_somebody_else_stay(bucket: str, tmp_path: Path) -> None:
    system, path = fsspec.core.url_to_fs(f"{bucket}/last.onnx")
    for place in (path, f"{path}.data", f"{path}.json"):
        system.pipe_file(place, b"mine")
    export, _ = train(tmp_path, bucket)
    failed = [report for report in export.reports if not report.ok]
    assert failed
    for report in failed:
        assert str(report.checkpoint).endswith("last.ckpt")
        assert "was not written by onnxport and is left alone" in str(report.error)
    for place in (path, f"{path}.data", f"{path}.json"):
        assert system.cat_file(place) == b"mine"


def test_a_later_run_removes_the_model_of_the_checkpoint_that_it_removes(
    bucket: str, tmp_path: Path
) -> None:
    train(tmp_path / "first", bucket)
    (best,) = stems(bucket, ".ckpt") - {"last"}
    later = RemoteModels(tmp_path / "second")
    model = later.local(f"{bucket}/{best}.onnx")
    later.remove(model, f"{bucket}/another.ckpt")
    assert best in stems(bucket, ".onnx")
    later.remove(model, f"{bucket}/{best}.ckpt")
    assert stems(bucket, ".onnx") == stems(bucket, ".onnx.json") == {"last"}


def test_a_failed_upload_leaves_no_model_of_older_weights(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = RemoteModels(tmp_path)
    model = models.local(f"{bucket}/model.onnx")
    report = onnxport.export(torch.nn.Linear(2, 1), torch.randn(3, 2), model, core="trace")
    assert models.deliver(report, model).ok
    assert stems(bucket, ".onnx") == {"model"}
    put = models._put

    def half(file: Path, url: str) -> None:
        if url.endswith(".onnx"):
            raise OSError("token expired (injected)")
        put(file, url)

    monkeypatch.setattr(models, "_put", half)
    failed = models.deliver(report, model)
    assert "token expired" in str(failed.error)
    assert stems(bucket, "") == set()
    assert "token expired" in model.with_name("model.onnx.json").read_text()


def test_a_remote_folder_for_all_models_is_refused() -> None:
    with pytest.raises(onnxport.ConfigurationError, match="must be a folder of this machine"):
        OnnxExport(dirpath="s3://bucket/models")
    with pytest.raises(onnxport.ConfigurationError, match="must be a folder, got 3"):
        OnnxExport(dirpath=3)


def test_nothing_of_a_callback_binds_it_to_this_process(tmp_path: Path, bucket: str) -> None:
    export, _ = train(tmp_path, bucket)
    assert copy.deepcopy(export).reports == export.reports


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3-compatible server."""
    pytest.importorskip("s3fs", reason="make test-scale installs it")
    server = pytest.importorskip("moto.server", reason="make test-scale installs it")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("runs")
    yield "s3://runs/first"
    running.stop()


@pytest.mark.worker
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_object_store(s3: str, tmp_path: Path) -> None:
    export, _ = train(tmp_path, s3)
    assert [report.error for report in export.reports if not report.ok] == []
    assert_models_are_beside_their_checkpoints(s3, tmp_path)
