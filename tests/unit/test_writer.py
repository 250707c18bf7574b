"""Models on disk: whole under their final name, or not there."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from filelock import FileLock
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxport.errors import PublishError
from onnxport.exporter import writer
from onnxport.exporter.writer import (
    finish_graph,
    model_files,
    publish,
    remove_model,
    report_path,
    staging,
    sweep,
    withdraw_model,
    withdraw_staged,
    write_text,
    write_whole,
)
from onnxport.report import ExportReport
from onnxport.signature import ModelSignature, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.array([1.0, 2.0, 3.0], dtype=np.float32)
ROWS = np.array([[1.0, -1.0]], dtype=np.float32)
OURS = {"version": "1"}
REPORT = ExportReport(ok=False, error="no").to_json()
SIGNATURE = ModelSignature(
    inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 2)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
)


def model(
    weight: str = "module.weight",
    bias: str = "module.bias",
    image: str = "image",
    hidden: str = "hidden",
) -> ir.Model:
    """``image @ weight + bias``."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [image, weight], [hidden]),
            helper.make_node("Add", [hidden, bias], ["logits"]),
        ],
        "main",
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(WEIGHT, weight), numpy_helper.from_array(BIAS, bias)],
    )
    opset = [helper.make_opsetid("", 18)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))


def write(
    model: ir.Model,
    path: Path,
    *,
    metadata: Mapping[str, object] | None = None,
    prefix: str = "",
    signature: ModelSignature = SIGNATURE,
) -> None:
    weights = {f"module.{name}": prefix + name for name in ("weight", "bias")} if prefix else {}
    finish_graph(model, signature, weights)
    write_whole(model, path, metadata or {})


def shapes(path: Path) -> dict[str, list[int | str]]:
    """The dims of inputs and outputs in the file."""
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def run(path: Path, image: str = "image") -> Any:
    return ReferenceEvaluator(str(path)).run(None, {image: ROWS})[0]


def initializers(path: Path) -> set[str]:
    return {found.name for found in onnx.load(path).graph.initializer}


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


# --- staging ----------------------------------------------------------------------------------


def test_the_staged_file_lies_in_a_hidden_folder_beside_the_final_one(tmp_path: Path) -> None:
    final = tmp_path / "models" / "deep" / "model.onnx"
    with staging(final) as staged:
        assert staged.name == "model.onnx"
        assert staged.parent.parent == final.parent
        assert staged.parent.name.startswith(".onnxport-")
        assert not staged.exists()
        staged.write_text("half", encoding="utf-8")
    assert files(final.parent) == []


def test_the_staging_folder_is_removed_after_an_error_too(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    expected = pytest.raises(ValueError, match="in the middle")
    with expected, staging(final) as staged:
        staged.write_text("half", encoding="utf-8")
        raise ValueError("in the middle")
    assert files(tmp_path) == []


def test_a_folder_that_somebody_is_about_to_sweep_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making it and locking it another process may have come."""
    make, swept = writer.tempfile.mkdtemp, []

    def met(**options: Any) -> str:
        folder = make(**options)
        if not swept:
            lock = FileLock(f"{folder}/lock", timeout=0, thread_local=False)
            lock.acquire()
            swept.append((folder, lock))
        return folder

    monkeypatch.setattr(writer.tempfile, "mkdtemp", met)
    with staging(tmp_path / "model.onnx") as staged:
        ((folder, lock),) = swept
        assert staged.parent != Path(folder)
        staged.write_bytes(b"model")
        lock.release()
        sweep(tmp_path)
        assert staged.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_loses_its_name_before_it_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has made it, and locks it once it is unlocked for removal, sees that it is not there."""
    left, clear, there = tmp_path / f"{writer.STAGING}left", writer._clear, []
    left.mkdir()

    def cleared(*given: Any) -> None:
        there.append(left.exists())
        clear(*given)

    monkeypatch.setattr(writer, "_clear", cleared)
    sweep(tmp_path)
    assert there == [False]
    assert list(tmp_path.iterdir()) == []


def test_two_stagings_of_one_model_do_not_meet(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    with staging(final) as first, staging(final) as second:
        assert first != second


def test_a_file_in_place_of_the_folder_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way", encoding="utf-8")
    match = r"Cannot write to .*models: a file is where the folder would be\. .*dirpath="
    with (
        pytest.raises(PublishError, match=match) as caught,
        staging(tmp_path / "models" / "model.onnx"),
    ):
        pass
    assert isinstance(caught.value.__cause__, OSError)
    assert files(tmp_path) == ["models"]


# --- publishing -------------------------------------------------------------------------------


def test_publishing_moves_the_model_and_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    write(model(), final, metadata=OURS)
    old = final.read_bytes()
    with staging(final) as staged:
        staged.write_text("new", encoding="utf-8")
        assert final.read_bytes() == old
        publish(staged, final)
        assert not staged.exists()
    assert final.read_text(encoding="utf-8") == "new"
    assert files(tmp_path) == ["model.onnx"]


def test_external_data_move_with_their_model(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    with staging(final) as staged:
        staged.write_text("graph", encoding="utf-8")
        staged.with_name("model.onnx.data").write_text("weights", encoding="utf-8")
        publish(staged, final)
    assert files(tmp_path) == ["model.onnx", "model.onnx.data"]


def test_external_data_of_the_old_model_go_when_the_new_one_has_none(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    final.with_name("model.onnx.data").write_text("old weights", encoding="utf-8")
    with staging(final) as staged:
        staged.write_text("graph", encoding="utf-8")
        publish(staged, final)
    assert files(tmp_path) == ["model.onnx"]


def test_a_folder_under_the_final_name_is_told_and_left_alone(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    final.mkdir()
    (final / "theirs").write_text("keep", encoding="utf-8")
    with staging(final) as staged:
        staged.write_text("graph", encoding="utf-8")
        with pytest.raises(PublishError, match=r"Cannot write .*model\.onnx: Is a directory\. Not"):
            publish(staged, final)
    assert files(tmp_path) == ["model.onnx", "model.onnx/theirs"]


def test_when_publishing_fails_no_data_are_left_under_the_final_name(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    final.mkdir()
    with staging(final) as staged:
        staged.write_text("graph", encoding="utf-8")
        staged.with_name("model.onnx.data").write_text("weights", encoding="utf-8")
        with pytest.raises(PublishError, match="Nothing half-written is left there"):
            publish(staged, final)
    assert files(tmp_path) == ["model.onnx"]


def test_a_model_that_was_never_staged_cannot_be_published(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    write(model(), final, metadata=OURS)
    old = final.read_bytes()
    with (
        staging(final) as staged,
        pytest.raises(PublishError, match="No such file or directory"),
    ):
        publish(staged, final)
    assert final.read_bytes() == old


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json"])
def test_a_file_of_somebody_else_is_not_replaced(name: str, tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    (tmp_path / name).write_text("theirs", encoding="utf-8")
    with staging(final) as staged:
        staged.write_text("graph", encoding="utf-8")
        with pytest.raises(PublishError, match=rf"{name} was not written by onnxport.*dirpath="):
            publish(staged, final)
    assert files(tmp_path) == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "theirs"


# --- removing ---------------------------------------------------------------------------------


def test_removing_takes_model_data_and_report_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(model(), path, metadata=OURS)
    (tmp_path / "model.onnx.data").write_text("weights", encoding="utf-8")
    report_path(path).write_text(REPORT, encoding="utf-8")
    theirs = ["model.ckpt", "model.onnx.bak", "model.onnx.data.old", "model2.onnx", "model.json"]
    for name in theirs:
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert [file.name for file in model_files(path)] == ["model.onnx", "model.onnx.data"]
    remove_model(path)
    assert files(tmp_path) == sorted(theirs)


def test_removing_takes_a_model_whose_report_is_gone(tmp_path: Path) -> None:
    write(model(), tmp_path / "model.onnx", metadata=OURS)
    remove_model(tmp_path / "model.onnx")
    assert files(tmp_path) == []


def test_removing_leaves_what_somebody_else_wrote(tmp_path: Path) -> None:
    theirs = ["model.onnx", "model.onnx.data", "model.onnx.json"]
    for name in theirs:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    remove_model(tmp_path / "model.onnx")
    assert files(tmp_path) == theirs
    report_path(tmp_path / "model.onnx").write_text(REPORT, encoding="utf-8")
    remove_model(tmp_path / "model.onnx")
    assert files(tmp_path) == theirs[:2]


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_model(tmp_path / "model.onnx")
    assert model_files(tmp_path / "model.onnx") == ()
    report_path(tmp_path / "model.onnx").write_text(REPORT, encoding="utf-8")
    remove_model(tmp_path / "model.onnx")
    assert files(tmp_path) == []


# --- small files ------------------------------------------------------------------------------


def test_text_is_written_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx.json"
    write_text(path, "old")
    write_text(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert files(tmp_path) == ["model.onnx.json"]


def test_text_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx.json"
    write_text(path, "old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(writer, "sync_file", create_autospec(writer.sync_file, side_effect=full))
    with pytest.raises(PublishError, match=r"model\.onnx\.json: No space left on device\. Nothing"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert files(tmp_path) == ["model.onnx.json"]


def test_a_folder_under_the_name_of_a_small_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(PublishError, match=r"Cannot write .*report\.json: Is a directory"):
        write_text(tmp_path / "report.json", "text")


# --- writing a model --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "net.", "model.backbone."])
def test_weights_get_the_names_of_the_checkpoint(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(model(), path, prefix=prefix)
    assert initializers(path) == {f"{prefix}weight", f"{prefix}bias"}
    onnx.checker.check_model(path)
    assert np.array_equal(run(path), ROWS @ WEIGHT + BIAS)


def test_initializers_that_are_no_weights_keep_their_names(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(model(bias="constant_3"), path, prefix="net.")
    assert initializers(path) == {"net.weight", "constant_3"}


def test_a_weight_keeps_its_name_where_another_weight_has_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(model(weight="module.bias", bias="bias"), path)
    assert initializers(path) == {"module.bias", "bias"}
    assert np.array_equal(run(path), ROWS @ WEIGHT + BIAS)


@pytest.mark.parametrize("value", ["image", "hidden", "logits"])
def test_a_weight_that_is_called_like_another_value_leaves_the_graph_valid(
    value: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    write(model(weight=f"module.{value}"), path)
    onnx.checker.check_model(path)
    assert np.array_equal(run(path), ROWS @ WEIGHT + BIAS)


def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    metadata = {"checkpoint": "a.ckpt", "epoch": 3, "dynamic_axes": {"image": {0: "batch"}}}
    write(model(), path, metadata=metadata)
    loaded = onnx.load(path)
    assert loaded.producer_name == "onnxport"
    props = {prop.key: prop.value for prop in loaded.metadata_props}
    assert props["onnxport.checkpoint"] == "a.ckpt"
    assert json.loads(props["onnxport.epoch"]) == 3
    assert json.loads(props["onnxport.dynamic_axes"]) == {"image": {"0": "batch"}}


def test_dims_that_the_exporter_left_open_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    opened = model()
    opened.graph.inputs[0].shape = ir.Shape([None, "s77"])
    opened.graph.outputs[0].shape = None
    write(opened, path)
    assert shapes(path) == {"image": ["batch", 2], "logits": ["batch", 3]}


def test_dims_that_the_exporter_fixed_stay_so_that_the_proof_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fixed = model()
    fixed.graph.inputs[0].shape = ir.Shape([8, 2])
    fixed.graph.outputs[0].shape = ir.Shape([8])
    write(fixed, path)
    assert shapes(path) == {"image": [8, 2], "logits": [8]}


def test_small_weights_lie_in_the_file_itself(tmp_path: Path) -> None:
    write(model(), tmp_path / "model.onnx")
    assert files(tmp_path) == ["model.onnx"]


def test_weights_beyond_the_limit_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "EXTERNAL_DATA_BYTES", WEIGHT.nbytes)
    path = tmp_path / "model.onnx"
    write(model(), path, prefix="net.")
    assert files(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert model_files(path) == (path, tmp_path / "model.onnx.data")
    assert initializers(path) == {"net.weight", "net.bias"}
    assert np.array_equal(run(path), ROWS @ WEIGHT + BIAS)


def test_a_model_with_external_data_is_usable_after_it_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "EXTERNAL_DATA_BYTES", 0)
    final = tmp_path / "model.onnx"
    with staging(final) as staged:
        write(model(), staged)
        publish(staged, final)
    assert np.array_equal(run(final), ROWS @ WEIGHT + BIAS)


def test_data_of_an_earlier_attempt_do_not_stay_beside_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "EXTERNAL_DATA_BYTES", 0)
        write(model(), path)
    write(model(), path)
    assert model_files(path) == (path,)


def test_a_full_disk_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(ir, "save", create_autospec(ir.save, side_effect=full))
    match = r"Cannot write .*model\.onnx: No space left on device\. .*free some space"
    with pytest.raises(PublishError, match=match):
        write(model(), tmp_path / "model.onnx")


def test_a_folder_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="No such file or directory"):
        write(model(), tmp_path / "absent" / "model.onnx")


def test_a_model_that_is_withdrawn_loses_its_names_at_once_and_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(model(), path, metadata=OURS)
    write_text(report_path(path), REPORT)
    withdraw_model(path)
    assert [file for file in tmp_path.iterdir() if not file.name.startswith(".onnxport-")] == []
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_not_withdrawn(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).write_text("mine")
    withdraw_model(tmp_path / "model.onnx")
    assert {file.read_text() for file in tmp_path.iterdir()} == {"mine"}


def test_what_is_staged_and_withdrawn_cannot_be_published(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with staging(path) as staged:
        write(model(), staged, metadata=OURS)
        withdraw_staged(path)
        with pytest.raises(PublishError):
            publish(staged, path)
    assert not path.exists()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_withdrawn_while_it_is_written_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(PublishError):
        write_text(path.with_name("model.onnx.json"), "{}", lambda: withdraw_staged(path))
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
