"""Each core alone, the order of all, and models from other people's packages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort
import pytest
import torch
import zoo
from torch import nn

from onnxport import Example, ExportError, Tolerance, VerificationError, Verify, export, verify
from onnxport.pipeline import proof

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.integration

IMAGE = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))


# torch's TransformerEncoderLayer asks for autocast in its source, which script cannot translate.
@pytest.mark.parametrize(
    ("make", "core"),
    [(make, core) for make in (zoo.cnn, zoo.Tied) for core in ("dynamo", "trace", "script")]
    + [(zoo.Transformer, core) for core in ("dynamo", "trace")],
)
def test_every_core_exports_plain_models(
    make: Callable[[], nn.Module], core: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "FLOAT64_S", 600.0)  # however busy the machine is
    module = make().train()
    report = export(module, IMAGE, tmp_path / "model.onnx", core=core)
    assert report.core == core
    assert all(m.training for m in module.modules())
    assert {check.sizes["batch"] for check in report.checks} == {1, 2, 6, 7}
    assert {check.rows for check in report.checks} == {"real", "negated", "scaled", "shuffled"}
    assert {check.reference for check in report.checks} == {"float64"}
    session = ort.InferenceSession(report.path)
    first, second = (session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()}) for _ in "ab")
    assert (first[0] == second[0]).all()
    assert "Dropout" not in {node.op_type for node in onnx.load(report.path).graph.node}


@pytest.mark.parametrize("core", ["dynamo", "trace", "script"])
def test_graphs_are_clean(core: str, tmp_path: Path) -> None:
    report = export(zoo.cnn().train(), IMAGE, tmp_path / "model.onnx", core=core)
    graph = onnx.load(report.path).graph
    flags = {a.i for node in graph.node for a in node.attribute if a.name == "training_mode"}
    assert flags <= {0}
    known = {value.name for value in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= known
    weights = set(zoo.cnn().state_dict())
    names = {value.name for value in graph.initializer}
    assert {name for name in names if "." in name} <= weights


@pytest.mark.parametrize("make", [zoo.BatchSizeBranch, zoo.DataBranch])
@pytest.mark.parametrize("core", ["dynamo", "trace"])
def test_a_branch_that_was_baked_in_is_never_published(
    make: Callable[[], nn.Module], core: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="No core produced a model") as caught:
        export(make(), IMAGE, tmp_path / "model.onnx", core=core)
    assert not (tmp_path / "model.onnx").exists()
    report = caught.value.report
    assert report is not None
    assert not report.ok
    assert all(attempt.reason for attempt in report.attempts)


@pytest.mark.parametrize("make", [zoo.BatchSizeBranch, zoo.DataBranch])
def test_script_rescues_control_flow(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    report = export(make(), IMAGE, tmp_path / "model.onnx")
    assert report.core == "script"
    assert [attempt.core for attempt in report.attempts][-2:] == ["trace", "script"]
    assert "If" in {node.op_type for node in onnx.load(report.path).graph.node}


def test_a_baked_shape_is_refused_or_dynamic(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="batch"):
        export(zoo.BakedShape(), IMAGE, tmp_path / "model.onnx", core="trace")
    assert not (tmp_path / "model.onnx").exists()


def test_the_reasons_name_the_operator_and_the_users_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No core produced") as caught:
        export(zoo.NoTranslation(), IMAGE, tmp_path / "model.onnx")
    assert caught.value.report is not None
    reasons = {attempt.core: attempt.reason for attempt in caught.value.report.attempts}
    assert "linalg_eig" in reasons["dynamo"]
    assert "zoo.py" in reasons["dynamo"]
    assert "an operator that no core can export" in reasons["dynamo"]
    assert "linalg_eigvals" in reasons["trace"]


def test_a_module_that_stays_random_in_eval_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"random in eval mode.*F\.dropout"):
        export(zoo.RandomInEval(), IMAGE, tmp_path / "model.onnx")


def test_nothing_is_printed_past_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="No core"):
        export(zoo.NoTranslation(), IMAGE, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_precision_can_be_chosen_and_bfloat16_is_widened(tmp_path: Path) -> None:
    module = zoo.Tied().bfloat16()
    report = export(module, IMAGE.bfloat16(), tmp_path / "model.onnx", core="trace")
    assert report.inputs[0].dtype == "float32"
    assert "bfloat16" in report.warnings[0]
    report = export(zoo.Tied(), IMAGE, tmp_path / "m.onnx", core="trace", precision="fp64")
    assert report.outputs[0].dtype == "float64"


def test_an_opset_can_be_chosen(tmp_path: Path) -> None:
    for core in ("dynamo", "trace"):
        path = tmp_path / f"{core}.onnx"
        report = export(zoo.Tied(), IMAGE, path, core=core, opset=18)
        assert report.opset == 18
        assert onnx.load(path).opset_import[0].version == 18


class NetworkThatAmplifiesRounding(nn.Module):
    """Adds and removes a large number: float32 keeps few digits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return ((self.head(image.flatten(1)) * 3.3 + 1e4) - 1e4).sin()


def test_rounding_that_the_network_amplifies_is_no_false_alarm(tmp_path: Path) -> None:
    report = export(NetworkThatAmplifiesRounding(), IMAGE, tmp_path / "model.onnx", core="trace")
    assert report.ok
    assert max(output.budget for check in report.checks for output in check.outputs) > 1e-3


# --- negative controls: a damaged model must be refused -----------------------------------------


def damaged(path: Path, damage: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(path)
    damage(proto)
    broken = path.with_name("damaged.onnx")
    onnx.save(proto, broken)
    return broken


def nudge_weight(proto: onnx.ModelProto) -> None:
    for init in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(init).copy()
        if array.ndim == 2:
            array[0, 0] += 1e-3
            init.CopyFrom(onnx.numpy_helper.from_array(array, init.name))
            return


def freeze_dimension(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 6


def rename_output(proto: onnx.ModelProto) -> None:
    old = proto.graph.output[0].name
    proto.graph.node.add(op_type="Identity", input=[old], output=["other"])
    proto.graph.output[0].name = "other"


def drop_a_node(proto: onnx.ModelProto) -> None:
    del proto.graph.node[-1]


def wrong_activation(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Relu")
    node.op_type = "Sigmoid"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (nudge_weight, "differs by"),
        (freeze_dimension, "should be dynamic and is fixed to 6"),
        (rename_output, r"outputs are \['other'\]"),
        (drop_a_node, "onnx.checker refuses"),
        (wrong_activation, "differs by"),
    ],
)
def test_a_damaged_model_is_refused(
    damage: Callable[[onnx.ModelProto], None], said: str, tmp_path: Path
) -> None:
    module = zoo.Tied()
    path = tmp_path / "model.onnx"
    export(module, IMAGE, path, core="trace")
    assert all(check.ok for check in verify(path, module, IMAGE))
    with pytest.raises(VerificationError, match=said):
        verify(damaged(path, damage), module, IMAGE)


def test_a_model_of_other_weights_is_refused(tmp_path: Path) -> None:
    export(zoo.Tied(), IMAGE, tmp_path / "model.onnx", core="trace")
    with pytest.raises(VerificationError, match="disagree at batch=1"):
        verify(tmp_path / "model.onnx", zoo.Tied(), IMAGE)


def test_a_stated_tolerance_replaces_the_budget(tmp_path: Path) -> None:
    module, path = zoo.Tied(), tmp_path / "model.onnx"
    export(module, IMAGE, path, core="trace")
    wrong = damaged(path, nudge_weight)
    assert verify(wrong, module, IMAGE, verify=Verify(tolerance=Tolerance(atol=0.1)))
    with pytest.raises(VerificationError, match="differs by"):
        verify(path, module, IMAGE, verify=Verify(tolerance=Tolerance(atol=0.0)))


def test_a_provider_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    wanted = Verify(providers=("CUDAExecutionProvider",))
    with pytest.raises(ExportError, match="asked for CUDAExecutionProvider"):
        export(zoo.Tied(), IMAGE, tmp_path / "model.onnx", core="trace", verify=wanted)


# --- models that others wrote -------------------------------------------------------------------


def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    ids = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bert":
        config = transformers.BertConfig(**size, intermediate_size=32)
        return transformers.BertForSequenceClassification(config), text
    if name == "distilbert":
        config = transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        return transformers.DistilBertForSequenceClassification(config), text
    config = transformers.ViTConfig(**size, intermediate_size=32, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(4, 3, 16, 16)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_transformers_models_come_out_with_their_own_names(name: str, tmp_path: Path) -> None:
    module, call = tiny(name)
    report = export(module, Example((), call), tmp_path / "model.onnx")
    assert [spec.name for spec in report.inputs] == list(call)
    assert report.outputs[0].name == "logits"
    assert report.dynamic_axes["logits"] == {0: "batch"}
