"""What a file says about itself, read without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxport.exporter.ownership import is_ours, read_metadata

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, metadata: dict[str, str], rows: int = 4) -> None:
    weight = numpy_helper.from_array(np.ones((rows, 3), np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    model = helper.make_model(graph, producer_name="somebody", ir_version=10)
    helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())


def test_our_metadata_are_read_without_their_prefix(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path, {"onnxport.checkpoint": "größe.ckpt", "author": "me", "onnxport.epoch": "3"})
    assert read_metadata(path) == {"checkpoint": "größe.ckpt", "epoch": "3"}
    assert is_ours(path)


@pytest.mark.parametrize("metadata", [{}, {"author": "onnxport"}, {"onnxport": "1"}])
def test_a_model_without_them_is_not_ours(metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path, metadata)
    assert read_metadata(path) == {}
    assert not is_ours(path)


@pytest.mark.parametrize("content", [b"", b"mine", b"\xff" * 64, b"\x72\xff\xff\xff\xff\x0f", b"r"])
def test_what_is_no_model_is_not_ours(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert not is_ours(path)


def test_half_a_model_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path, {"onnxport.version": "1"})
    whole = path.read_bytes()
    for end in range(len(whole) - 1):
        path.write_bytes(whole[:end])
        assert not is_ours(path)


def test_a_folder_or_nothing_is_not_ours(tmp_path: Path) -> None:
    assert not is_ours(tmp_path)
    assert not is_ours(tmp_path / "absent.onnx")


def test_weights_are_skipped_not_read(tmp_path: Path) -> None:
    """A graph field of 1 TB, which the file system does not really hold."""
    path = tmp_path / "model.onnx"
    size = 2**40
    length = bytes([*((size >> shift & 0x7F) | 0x80 for shift in range(0, 35, 7)), size >> 35])
    with path.open("wb") as file:
        file.write(b"\x08\x0a\x3a" + length)
        file.seek(size, 1)
        file.write(b"\x72\x17\x0a\x10onnxport.version\x12\x03" + b"1.0")
    assert read_metadata(path) == {"version": "1.0"}
