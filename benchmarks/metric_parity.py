"""Run the own validation of other people's LightningModules with ONNX models in their place.

    python benchmarks/metric_parity.py [--only TEXT]

Each module is trained for two epochs with ``OnnxExport(validate_metrics=True)``, and what its
``validation_step`` logs is compared, of each checkpoint. The packages are those of the coverage
benchmark (``make coverage`` installs them). Results go to ``benchmarks/results/metric_parity.*``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from onnxport import OnnxExport
from onnxport.callbacks.lightning.names import framework_of

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "onnx", "onnxruntime")
SPLIT = 120
"""Steps of a series before its validation."""
Made = tuple[Any, Any, Any]


def series() -> pd.DataFrame:
    """Return noisy waves of several groups."""
    noise = np.random.default_rng(0)
    steps = np.arange(160)
    return pd.concat(
        pd.DataFrame(
            {
                "time": steps,
                "group": str(group),
                "value": np.sin(steps / (5 + group)) + 0.1 * noise.standard_normal(len(steps)),
            }
        )
        for group in range(6)
    ).reset_index(drop=True)


def forecasting(kind: str, **options: Any) -> Made:
    """A model of pytorch-forecasting on its own data set."""
    import pytorch_forecasting as package

    frame = series()
    common = {
        "time_idx": "time",
        "target": "value",
        "group_ids": ["group"],
        "max_encoder_length": 24,
        "max_prediction_length": 6,
        "time_varying_unknown_reals": ["value"],
    }
    train = package.TimeSeriesDataSet(frame[frame.time < SPLIT], **common)
    validate = package.TimeSeriesDataSet.from_dataset(train, frame, min_prediction_idx=SPLIT)
    module = getattr(package, kind).from_dataset(train, log_interval=0, **options)
    return (
        module,
        train.to_dataloader(train=True, batch_size=64),
        validate.to_dataloader(train=False, batch_size=64),
    )


def tabular() -> Made:
    """A model of pytorch-tabular, with the data module that it makes itself."""
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig
    from sklearn.datasets import load_wine

    frame = load_wine(as_frame=True).frame
    frame["kind"] = (frame["alcohol"] * 2).astype(int).astype(str)
    made = TabularModel(
        data_config=DataConfig(
            target=["target"],
            continuous_cols=[name for name in frame.columns if name not in {"target", "kind"}],
            categorical_cols=["kind"],
            num_workers=0,
        ),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="32-16"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=32, progress_bar="none"),
        verbose=False,
    )
    data = made.prepare_dataloader(train=frame, seed=0)
    return made.prepare_model(data), data.train_dataloader(), data.val_dataloader()


def neural() -> Made:
    """A model of neuralforecast, with its own data module."""
    from neuralforecast.models import NHITS
    from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

    frame = series().rename(columns={"time": "ds", "group": "unique_id", "value": "y"})
    dataset, *_ = TimeSeriesDataset.from_df(frame[["unique_id", "ds", "y"]])
    module = NHITS(h=6, input_size=24, max_steps=20, val_check_steps=5, mlp_units=3 * [[32, 32]])
    module.val_size = 40
    data = TimeSeriesDataModule(dataset, batch_size=4, valid_batch_size=4)
    data.setup("fit")
    return module, data.train_dataloader(), data.val_dataloader()


CASES: dict[str, tuple[str, Callable[[], Made]]] = {
    "NHiTS": ("pytorch-forecasting", lambda: forecasting("NHiTS", hidden_size=16)),
    "TemporalFusionTransformer": (
        "pytorch-forecasting",
        lambda: forecasting("TemporalFusionTransformer", hidden_size=8, attention_head_size=2),
    ),
    "CategoryEmbeddingModel": ("pytorch_tabular", tabular),
    "NHITS": ("neuralforecast", neural),
}


def run(make: Callable[[], Made]) -> dict[str, Any]:
    """Train a module, and return what was compared."""
    torch.manual_seed(0)
    module, train, validate = make()
    framework = importlib.import_module(str(framework_of(type(module))))
    callbacks = importlib.import_module(f"{framework.__name__}.callbacks")
    export = OnnxExport(validate_metrics=True, mlflow=False, page=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = framework.Trainer(
            max_epochs=2,
            max_steps=-1,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            callbacks=[export, callbacks.ModelCheckpoint(folder, save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit(module, train, validate)
    found = [asdict(each.metric_parity) for each in export.reports if each.metric_parity]
    return {
        "proven": [each.ok for each in export.reports],
        "errors": [each.error for each in export.reports if each.error],
        "parity": found,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(rows: dict[str, Any]) -> str:
    """Return the last checkpoint of each module as a table."""
    lines = [
        "| module | batches | calls | metric | PyTorch | ONNX Runtime | within 1 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for parity in row["parity"][-1:]:
            lines += [
                f"| {row['package']} {row['version']}: `{name}` | {parity['batches']} | "
                f"{parity['calls']} | `{pair['name']}` | {pair['torch']:.7g} | "
                f"{pair['onnx']:.7g} | {'yes' if pair['ok'] else 'no'} |"
                for pair in parity["metrics"]
            ]
            if not parity["metrics"]:
                lines.append(f"| `{name}` | | | none: {parity['reason']} | | | no |")
        if not row["parity"]:
            lines.append(f"| `{name}` | | | none: {'; '.join(row['errors'])} | | | no |")
    return "\n".join(lines)


def main() -> int:
    """Run all, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    for name, (package, make) in CASES.items():
        if given.only in name:
            rows[name] = {"package": package, "version": version(package)} | run(make)
            print(name, json.dumps(rows[name])[:2000], flush=True)
    versions = {name: version(name) for name in PACKAGES}
    facts = {"date": datetime.now(UTC).date().isoformat(), "versions": versions}
    facts |= {"machine": platform.machine(), "python": platform.python_version()}
    if not given.only:
        text = json.dumps(facts | {"modules": rows}, indent=1)
        (RESULTS / "metric_parity.json").write_text(f"{text}\n")
        known = ", ".join(f"{key} {value}" for key, value in versions.items())
        head = f"# Metric parity\n\n{facts['date']}, {known}, two cores. Made by "
        head += "`benchmarks/metric_parity.py`.\n\n"
        (RESULTS / "metric_parity.md").write_text(f"{head}{table(rows)}\n")
    print(table(rows))
    return 0 if all(p["ok"] for row in rows.values() for p in row["parity"]) else 1


if __name__ == "__main__":
    sys.exit(main())
