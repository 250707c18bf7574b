"""What files of anybody may make us read, and how much of it."""

from __future__ import annotations

import pickle
import resource
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxport import ExportError, OnnxportError, UnsafeFileError
from onnxport._archive import require_archive
from onnxport._files import require_inside
from onnxport.callbacks.owed import owed
from onnxport.exporter import model_file
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.confined import require_confined
from onnxport.exporter.template import Slot
from onnxport.pipeline.blueprint_file import load_blueprint, read_plain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WEIGHTS = np.arange(6, dtype=np.float32)


def tensor(**place: str) -> TensorProto:
    """A tensor whose numbers are elsewhere."""
    found = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[6])
    found.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        found.external_data.add(key=key, value=value)
    return found


def model_with(found: TensorProto, where: str = "initializer") -> onnx.ModelProto:
    """A model that holds a tensor in one of the places where tensors can be."""
    constant = helper.make_node("Constant", [], ["w"], value=found)
    nodes, initializers, functions = [helper.make_node("Identity", ["w"], ["y"])], [], []
    if where == "initializer":
        initializers = [found]
    elif where == "attribute":
        nodes.insert(0, constant)
    elif where == "inner graph":
        inner = helper.make_graph(
            [constant], "inner", [], [helper.make_empty_tensor_value_info("w")]
        )
        nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]
    elif where == "function":
        opsets = [helper.make_opsetid("", 18)]
        functions = [helper.make_function("local", "f", [], ["w"], [constant], opsets)]
    else:
        sparse = onnx.SparseTensorProto(values=found)
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    graph = helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info("y")])
    graph.initializer.extend(initializers)
    return helper.make_model(graph, functions=functions)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a model, beside a secret."""
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    inside = tmp_path / "models"
    (inside / "sub").mkdir(parents=True)
    (inside / "w.data").write_bytes(WEIGHTS.tobytes())
    (inside / "sub" / "w.data").write_bytes(WEIGHTS.tobytes())
    (inside / "link.data").symlink_to("../secret")
    (inside / "linked").symlink_to("..")
    return inside


PLACES = ("initializer", "attribute", "inner graph", "function", "sparse attribute")


@pytest.mark.parametrize("where", PLACES)
def test_weights_of_another_folder_are_not_read(where: str, folder: Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(model_with(tensor(location="../secret"), where).SerializeToString())
    with pytest.raises(UnsafeFileError, match="not a path below its folder"):
        require_confined(path)
    path.write_bytes(model_with(tensor(location="w.data"), where).SerializeToString())
    require_confined(path)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ({"location": "/etc/passwd"}, "not a path below"),
        ({"location": "C:\\secret"}, "not a path below"),
        ({"location": "sub/../../secret"}, "not a path below"),
        ({"location": "..\\secret"}, "not a path below"),
        ({"location": ""}, "not a path below"),
        ({}, "not a path below"),
        ({"location": "link.data"}, "is a link"),
        ({"location": "linked/secret"}, "is a link"),
        ({"location": "sub"}, "not there"),
        ({"location": "none.data"}, "not there"),
        ({"location": "w.data", "offset": "4", "length": "24"}, "bytes"),
        ({"location": "w.data", "offset": "-4"}, "bytes"),
        ({"location": "w.data", "length": "-1"}, "bytes"),
        ({"location": "w.data", "offset": "many"}, "bytes"),
    ],
)
def test_what_a_model_may_not_refer_to(place: dict[str, str], why: str, folder: Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(model_with(tensor(**place)).SerializeToString())
    with pytest.raises(UnsafeFileError, match=why):
        require_confined(path)


def test_a_place_that_is_named_twice_is_refused(folder: Path) -> None:
    found = tensor(location="../secret")
    found.external_data.add(key="location", value="w.data")
    path = folder / "m.onnx"
    path.write_bytes(model_with(found).SerializeToString())
    with pytest.raises(UnsafeFileError, match="twice"):
        require_confined(path)


@pytest.mark.exhaustive
def test_what_a_checkpoint_holds_beside_tensors_may_be_large(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    weights = torch.ones(3)
    torch.save({"state_dict": {"w": weights}, "data": np.zeros(1 << 26)}, path)
    assert torch.equal(read_state_dict(path)["w"], weights)


@pytest.mark.parametrize(
    "place",
    [
        {"location": "w.data"},
        {"location": "sub/w.data", "offset": "0", "length": "24"},
        {"location": "w.data", "offset": "4", "length": "20"},
    ],
)
def test_what_a_model_may_refer_to(place: dict[str, str], folder: Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(model_with(tensor(**place)).SerializeToString())
    require_confined(path)


def test_a_model_of_many_weights_is_looked_at_without_them(folder: Path) -> None:
    path = folder / "m.onnx"
    large = numpy_helper.from_array(np.zeros(1 << 20, np.float32), "w")
    path.write_bytes(model_with(large).SerializeToString())
    require_confined(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"no model at all"])
def test_what_is_no_model_is_refused(content: bytes, folder: Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UnsafeFileError, match="no ONNX model"):
        require_confined(path)


def test_graphs_in_graphs_without_end_are_refused(folder: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        head = onnx.ModelProto(doc_string="x" * len(content)).SerializeToString()
        return bytes([number << 3 | 2]) + head[1 : len(head) - len(content)] + content

    graph = b""
    for _ in range(200):  # ModelProto.graph > GraphProto.node > NodeProto.attribute > .g
        graph = field(1, field(5, field(6, graph)))
    path = folder / "m.onnx"
    path.write_bytes(field(7, graph))
    with pytest.raises(UnsafeFileError, match="no ONNX model"):
        require_confined(path)


def test_links_out_of_a_folder_are_refused(folder: Path) -> None:
    (folder / "inner").symlink_to("w.data")
    require_inside(folder / "inner")
    require_inside(folder / "w.data")
    with pytest.raises(UnsafeFileError, match="outside of its folder"):
        require_inside(folder / "link.data")


# --- archives -----------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[None]:
    """Let the process have no more than 8 GiB above what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def archive(path: Path, pickled: bytes, *, packed: bool = False) -> Path:
    """An archive as of ``torch.save``, with a pickle of somebody's."""
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
    return path


@pytest.mark.usefixtures("limited")
def test_a_pickle_of_ten_bytes_does_not_take_all_memory(tmp_path: Path) -> None:
    bomb = b"\x80\x02}q\x00r\xff\xff\xff\x7f."  # remembers an object as the 2^31th
    with pytest.raises(ExportError) as raised:
        read_state_dict(archive(tmp_path / "m.ckpt", bomb))
    assert "MemoryError" not in str(raised.value)


@pytest.mark.parametrize("read", [read_state_dict, read_plain, load_blueprint])
def test_packed_archives_are_refused(read: Any, tmp_path: Path) -> None:
    pickled = pickle.dumps({"state_dict": {}, "filler": b"\0" * (1 << 24)}, protocol=2)
    path = archive(tmp_path / "m.ckpt", pickled, packed=True)
    assert path.stat().st_size < len(pickled) / 100
    with pytest.raises((OnnxportError, ValueError), match="packed"):
        read(path)


def test_parts_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.ckpt", b"\0" * 5000)
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("archive/data.pkl")
        for number in range(3):
            again = zipfile.ZipInfo(f"archive/{number}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            file.filelist.append(again)
            file.NameToInfo[again.filename] = again
        file._didModify = True
    with pytest.raises(ValueError, match="larger than the file"):
        require_archive(path)


def test_a_note_cannot_be_larger_than_any_of_ours(tmp_path: Path) -> None:
    note = tmp_path / ".m.onnx.pending"
    torch.save({"name": "", "filler": torch.zeros(1 << 25)}, note)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_plain(note)
    (tmp_path / "m.ckpt").touch()
    (debt,) = owed([tmp_path], "")  # by its name alone
    assert debt.reference is None


def test_a_view_of_one_number_is_not_laid_out(tmp_path: Path) -> None:
    slot = Slot(name="w", elem_type=TensorProto.FLOAT, dims=(4,), source="w")
    endless = torch.zeros(1).expand(1 << 44)
    with (
        (tmp_path / "m").open("wb", buffering=0) as file,
        pytest.raises(OnnxportError, match="nothing is written"),
    ):
        model_file.write_inline(file, b"", b"", [slot], [endless])
