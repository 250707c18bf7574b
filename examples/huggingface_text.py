"""Hugging Face's Trainer on texts: one callback makes the models, the best of them is asked.

Sentences of Python's own documentation are told from sentences of scikit-learn's. The weights are
random at first, the tokenizer is made here, the registry is a sqlite file: nothing is downloaded.
Run it with ``python examples/huggingface_text.py [folder]``.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import mlflow
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from onnxport.callbacks.transformers import OnnxExport

MODULES = {
    "Python": "argparse asyncio collections email http logging os pathlib subprocess threading",
    "scikit-learn": "sklearn.cluster sklearn.ensemble sklearn.linear_model sklearn.metrics",
}
ASKED = ["Open the file and return its descriptor.", "Fit the estimator to the training samples."]


def sentences(modules: str) -> list[str]:
    """Return what the documentation of modules says, a sentence each."""
    found = [vars(import_module(name)).values() for name in modules.split()]
    text = " ".join(str(each.__doc__) for values in found for each in values if callable(each))
    return sorted(set(re.findall(r"[A-Z][a-z]+ [a-z][\w ,\n]{30,120}\.", text)))[:300]


def train(root: Path) -> OnnxExport:
    """Train as ever, with one callback more."""
    torch.set_num_threads(1)  # so small a network is faster so
    texts = [(text, n) for n, each in enumerate(MODULES.values()) for text in sentences(each)]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    words = BertWordPieceTokenizer(**special)
    words.train_from_iterator([text for text, _ in texts], vocab_size=1000, show_progress=False)
    plain = Tokenizer.from_str(words.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    rows = [{**tokenizer(text), "labels": n} for text, n in texts]
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    names = dict(enumerate(MODULES))
    config = BertConfig(**sizes, num_attention_heads=2, id2label=names)
    export = OnnxExport(register="sources")
    trainer = Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            str(root / "checkpoints"),
            num_train_epochs=2,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=4e-3,
            save_strategy="epoch",
            eval_strategy="epoch",
            metric_for_best_model="accuracy",
            use_cpu=True,
            report_to="mlflow",
            disable_tqdm=True,
        ),
        train_dataset=[row for n, row in enumerate(rows) if n % 5],
        eval_dataset=rows[::5],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[export],
    )
    trainer.train()
    return export


def accuracy(results: EvalPrediction) -> dict[str, float]:
    """Return the part that is recognised."""
    return {"accuracy": float((results.predictions.argmax(1) == results.label_ids).mean())}


def ask_the_champion() -> None:
    """Load the best model from the registry, with the tokenizer that lies beside it."""
    folder = Path(mlflow.artifacts.download_artifacts("models:/sources@champion"))
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    champion = mlflow.pyfunc.load_model(str(folder))
    names = champion.metadata.get_input_schema().input_names()
    given = tokenizer(ASKED, padding=True, return_tensors="np")
    (logits,) = champion.predict({name: given[name] for name in names}).values()
    for text, place in zip(ASKED, logits.argmax(1).tolist(), strict=True):
        print(f"{text} -> {config.id2label[place]}")


def main() -> None:
    """Train, and ask the best model."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="onnxport-"))
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    if mlflow.get_experiment_by_name("sources") is None:
        mlflow.create_experiment("sources", artifact_location=(root / "artifacts").as_uri())
    mlflow.set_experiment("sources")
    export = train(root)
    print(sum(report.ok for report in export.reports), "proven models in", root)
    ask_the_champion()


if __name__ == "__main__":
    main()
