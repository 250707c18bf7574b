"""Hugging Face's Trainer: what is special about its models, its checkpoints and its MLflow run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import onnxport
from onnxport import Background
from onnxport.callbacks.transformers import OnnxExport
from onnxport.cli.models import _compared
from onnxport.exporter.checkpoint_file import read_state_dict
from onnxport.exporter.ownership import read_metadata
from onnxport.worker.client import worker_for

if TYPE_CHECKING:
    from onnxport import ExportReport

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

WORDS = ["[PAD]", "[UNK]", "[MASK]", *(f"w{number}" for number in range(40))]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def tokenizer() -> PreTrainedTokenizerFast:
    pad, unknown, mask = WORDS[:3]
    words = models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token=unknown)
    plain = Tokenizer(words)
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=pad, unk_token=unknown, mask_token=mask
    )


def texts() -> list[dict[str, Any]]:
    """Texts of other lengths from batch to batch, and a class for each."""
    made = tokenizer()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place in range(48):
        length = 4 + place // 8 % 5
        ids = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        encoded = made(" ".join(WORDS[each] for each in ids))
        rows.append(dict(encoded) | {"labels": place % 3})
    return rows


def classifier(**options: Any) -> BertForSequenceClassification:
    names = {0: "good", 1: "bad", 2: "neither"}
    return BertForSequenceClassification(BertConfig(**SIZES, id2label=names, **options))


def train(
    root: Path,
    export: OnnxExport | None,
    model: Any = None,
    *others: TrainerCallback,
    data: Any = None,
    resume: bool = False,
    **arguments: Any,
) -> tuple[Trainer, Any]:
    torch.manual_seed(0)
    model = classifier() if model is None else model
    chosen = {
        "max_steps": 9,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    } | arguments
    trainer = Trainer(
        model,
        TrainingArguments(str(root), **chosen),
        train_dataset=data or texts(),
        eval_dataset=(data or texts())[:16],
        processing_class=tokenizer(),
        data_collator=DataCollatorWithPadding(tokenizer()),
        callbacks=[*([] if export is None else [export]), *others],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


def callback(**options: Any) -> OnnxExport:
    return OnnxExport(**{"core": "trace", "background": False, "mlflow": False} | options)


def ask(model: Path, **arrays: Any) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, arrays), strict=True))


def proven(export: OnnxExport) -> list[ExportReport]:
    assert [report.error for report in export.reports if not report.ok] == []
    return export.reports


def test_the_model_takes_texts_of_any_length_and_no_labels(tmp_path: Path) -> None:
    export = callback()
    train(tmp_path, export)
    for report in proven(export):
        assert {spec.name for spec in report.inputs} >= {"input_ids", "attention_mask"}
        assert "labels" not in {spec.name for spec in report.inputs}
        assert [spec.name for spec in report.outputs] == ["logits"]
        assert {tuple(spec.shape) for spec in report.inputs} == {("batch", "sequence")}
    folder = tmp_path / "checkpoint-9"
    restored = BertForSequenceClassification.from_pretrained(folder).eval()
    given = tokenizer()(["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11", "w1 w5"], padding=True)
    arrays = {name: np.array(value, dtype=np.int64) for name, value in given.items()}
    names = {spec.name for spec in export.reports[-1].inputs}
    actual = ask(folder / "model.onnx", **{k: v for k, v in arrays.items() if k in names})
    with torch.no_grad():
        expected = restored(**{name: torch.from_numpy(v) for name, v in arrays.items()}).logits
    torch.testing.assert_close(torch.from_numpy(actual["logits"]), expected, atol=1e-5, rtol=1e-4)
    assert json.loads(read_metadata(folder / "model.onnx")["id2label"])["0"] == "good"


def test_adapters_of_a_large_model_are_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"])
    model = get_peft_model(classifier(), options)
    export = callback()
    best = {"save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer, _ = train(tmp_path, export, model, learning_rate=0.01, **best)
    assert len(proven(export)) == 3
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert {path.parent.name for path in tmp_path.rglob("*.onnx")} == folders
    ids = torch.randint(3, len(WORDS), (3, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {spec.name for spec in export.reports[-1].inputs}
    arrays = {name: value.numpy() for name, value in given.items() if name in names}
    with torch.no_grad():  # the best weights are loaded
        expected = model.eval()(**given).logits
    best_model = Path(trainer.state.best_model_checkpoint) / "model.onnx"
    adapter = best_model.with_name("adapter_model.safetensors")
    assert "an adapter" in _compared(best_model, adapter)["why"]
    found = ask(best_model, **arrays)
    torch.testing.assert_close(torch.from_numpy(found["logits"]), expected, atol=1e-5, rtol=1e-4)


def test_callbacks_of_one_trainer_do_not_write_the_same_files(tmp_path: Path) -> None:
    first, same, part = callback(), callback(), callback(target="classifier")
    train(tmp_path, first, None, same, part)
    assert len(proven(first)) == len(proven(part)) == 3
    assert [report.ok for report in same.reports] == [False]
    names = {path.name for path in tmp_path.glob("checkpoint-9/*.onnx")}
    assert names == {"model.onnx", "model-classifier.onnx"}


def test_models_follow_the_limit_and_the_best_is_kept(tmp_path: Path) -> None:
    export = callback(on_error="raise")
    options = {"save_total_limit": 1, "load_best_model_at_end": True}
    trainer, _ = train(tmp_path, export, metric_for_best_model="loss", **options)
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert folders == {path.parent.name for path in tmp_path.rglob("model.onnx")}
    best = trainer.state.best_model_checkpoint
    assert best is not None
    (report,) = [each for each in proven(export) if str(each.path).startswith(best)][-1:]
    assert report.metrics["eval_loss"] == pytest.approx(trainer.state.best_metric)
    assert report.weights_sha256 == onnxport.weights_sha256(trainer.model.state_dict())


def test_the_trainer_keeps_the_checkpoints_that_it_would_keep(tmp_path: Path) -> None:
    """It tells the oldest by the time of the folder, which a file of ours changes."""

    class Late(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:  # as a model that comes after the next checkpoint
                (tmp_path / "checkpoint-3" / "model.onnx.json").touch()
                later = time.time() + 60
                os.utime(tmp_path / "checkpoint-3", (later, later))

    trainer, _ = train(tmp_path, callback(), None, Late(), save_total_limit=2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}
    assert "save_to_json" not in vars(trainer.state)


def test_only_the_best_at_the_end(tmp_path: Path) -> None:
    export = callback(when="end")
    model = BertForMaskedLM(BertConfig(**SIZES))  # whose weights are tied: files have them once
    rows = [{"input_ids": [3, 4, 5, 2, 7], "labels": [3, 4, 5, 6, 7]} for _ in range(48)]
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[export]
    )
    trainer.train()
    (report,) = proven(export)
    assert str(report.path) == f"{trainer.state.best_model_checkpoint}/model.onnx"
    assert report.weights_sha256 == onnxport.weights_sha256(model.state_dict())
    assert report.metrics["eval_loss"] == pytest.approx(trainer.state.best_metric)
    for checkpoint in (Path(report.path).parent, Path(report.path).with_name("model.safetensors")):
        assert _compared(Path(report.path), checkpoint)["ok"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.exhaustive),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.exhaustive
        ),
        {"bf16": True},
    ],
    ids=["gradient checkpointing", "compiled", "bf16"],
)
def test_ways_to_train(arguments: dict[str, Any], tmp_path: Path) -> None:
    export = callback()
    trainer, model = train(tmp_path / "with", export, **arguments)
    plain, other = train(tmp_path / "without", None, **arguments)
    losses = [
        [row["loss"] for row in one.state.log_history if "loss" in row] for one in (trainer, plain)
    ]
    assert losses[0] == losses[1]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert len(proven(export)) == 3
    for report in export.reports:
        assert [spec.name for spec in report.outputs] == ["logits"]


def test_a_run_that_goes_on_replaces_its_models(tmp_path: Path) -> None:
    train(tmp_path, callback(), max_steps=6)
    export = callback()
    torch.manual_seed(0)
    _, model = train(tmp_path, None, max_steps=3)
    again = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=6, save_steps=3, use_cpu=True, report_to=[]),
        train_dataset=texts(),
        data_collator=DataCollatorWithPadding(tokenizer()),
        callbacks=[export],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (report,) = proven(export)
    assert str(report.path) == str(tmp_path / "checkpoint-6" / "model.onnx")
    state = read_state_dict(tmp_path / "checkpoint-6" / "model.safetensors")
    assert read_metadata(tmp_path / "checkpoint-6" / "model.onnx")[
        "weights_sha256"
    ] == onnxport.weights_sha256(state)


def test_weights_of_another_name_keep_their_models(tmp_path: Path) -> None:
    class Renames(Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            folder = Path(str(output_dir))
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")

    export = callback()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    collator = DataCollatorWithPadding(tokenizer())
    data: Any = texts()
    Renames(
        classifier(), arguments, train_dataset=data, data_collator=collator, callbacks=[export]
    ).train()
    assert len(proven(export)) == 2
    assert {path.parent.name for path in tmp_path.rglob("model.onnx")} == {
        "checkpoint-2",
        "checkpoint-4",
    }


def test_weights_in_several_files(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    state = read_state_dict(tmp_path / "model.safetensors.index.json")
    assert onnxport.weights_sha256(state) == onnxport.weights_sha256(model.state_dict())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(onnxport.ExportError, match="a file elsewhere"):
        read_state_dict(index)


def test_the_run_of_the_trainer_gets_the_model_with_its_tokenizer(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "reviews")
    mlflow.set_tracking_uri(store)
    client = mlflow.MlflowClient(store)
    client.create_experiment("reviews", artifact_location=(tmp_path / "artifacts").as_uri())
    export = callback(mlflow="auto", register="reviews")
    train(tmp_path / "run", export, report_to=["mlflow"], metric_for_best_model="loss")
    experiment = client.get_experiment_by_name("reviews").experiment_id
    (run,) = client.search_runs([experiment])  # that of the Trainer, and no other
    found = {report.tracking.run_id for report in proven(export) if report.tracking}
    assert found == {run.info.run_id}
    logged = client.search_logged_models([experiment])
    assert {model.name for model in logged} == {"checkpoint-3", "checkpoint-6", "checkpoint-9"}
    champion = client.get_model_version_by_alias("reviews", "champion")
    folder = mlflow.artifacts.download_artifacts(
        f"models:/reviews/{champion.version}", dst_path=str(tmp_path / "fetched")
    )
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    served = mlflow.pyfunc.load_model("models:/reviews@champion")
    given = loaded(["w1 w2 w3", "w4"], padding=True)
    names = set(served.metadata.get_input_schema().input_names())
    arrays = {k: np.array(v, dtype=np.int64) for k, v in given.items() if k in names}
    answer = served.predict(arrays)
    assert np.asarray(answer["logits"]).shape == (2, 3)
    assert BertConfig.from_pretrained(folder).id2label[0] == "good"


@pytest.mark.worker
def test_what_is_owed_of_tied_weights_is_made_from_files_that_have_them_once(
    tmp_path: Path,
) -> None:
    background = Background(drain_s=1)
    export = callback(background=background)
    stopped: list[int] = []

    class Stops(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:  # all wait for the first one
                while not export.reports:
                    time.sleep(0.001)
                stopped.append(worker_for(background, 0).pid)
                os.kill(stopped[0], signal.SIGSTOP)

    masked = BertForMaskedLM(BertConfig(**SIZES))
    rows = [{"input_ids": [3, 4, 5, 2, 7], "labels": [3, 4, 5, 6, 7]} for _ in range(48)]
    often = {"data": rows, "eval_strategy": "no", "save_steps": 1}
    run, again = tmp_path / "run", tmp_path / "again"
    train(run, export, masked, Stops(), **often)
    os.kill(stopped[0], signal.SIGKILL)
    shutil.copytree(run, again)
    made = onnxport.resume(run)
    assert len(made) > 4
    assert {report.error for report in made} == {None}
    next_fit, fresh = callback(), BertForMaskedLM(BertConfig(**SIZES))
    train(again, next_fit, fresh, **often | {"resume": True, "max_steps": 14})
    assert {report.error for report in next_fit.reports} == {None}
    assert len(list(again.glob("checkpoint-*/model.onnx"))) == 14
    for folder in (run / "checkpoint-9", again / "checkpoint-7", again / "checkpoint-9"):
        restored = BertForMaskedLM.from_pretrained(folder).eval()
        ids = torch.randint(3, len(WORDS), (3, 5))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        names = {spec.name for spec in made[0].inputs}
        arrays = {name: value.numpy() for name, value in given.items() if name in names}
        with torch.no_grad():
            expected = restored(**given).logits
        actual = torch.from_numpy(ask(folder / "model.onnx", **arrays)["logits"])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_weights_in_parts_are_refused_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = torch.distributed.fsdp.fully_shard(classifier(), mesh=mesh)
        export = callback()
        trainer, _ = train(tmp_path / "run", export, model, save_strategy="no", eval_strategy="no")
        assert trainer.state.global_step == 9
        (report,) = export.reports
        assert "part of the weights" in str(report.error)
        monkeypatch.setattr(Trainer, "_save", lambda *_, **__: None)  # which takes an accelerator
        train(tmp_path / "saved", export, model, eval_strategy="no")
        assert len(export.reports) == 1 + 3
        assert all("part of the weights" in str(report.error) for report in export.reports)
        assert onnxport.resume(tmp_path) == []  # and nothing is owed
    finally:
        torch.distributed.destroy_process_group()
