"""Rows per second with which a table is scored by the champion: Spark, Ray Data, and a plain loop.

    make test-scale  # installs pyspark, pyarrow and ray
    python benchmarks/scoring.py [--rows 1000000] [--features 64] [--width 512]

A table of float32 features in Parquet; a network of two hidden layers, in the registry. Each way
reads the table, scores it, and drops what comes out:

- *loop*: one process, ``pyarrow`` and ONNX Runtime with the session options of the package, one
  thread.
- *Spark*: ``onnxport.tracking.spark_udf`` on 1 and 2 executors of one core, which are processes of
  their own.
- *Ray*: ``map_batches`` with 1 and 2 actors of one core that load the model through
  ``mlflow.pyfunc``.

The first pass starts processes and loads models; it is not counted. Rows per second are those of
the fastest of three passes after it. Ray starts its actors for each dataset, which takes several
seconds: its time is counted from the first block that comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import torch
from lockstep_report import about
from torch import nn

import onnxport
from onnxport.config import MLflow
from onnxport.pipeline.report_files import read_report
from onnxport.report import Provenance
from onnxport.tracking import spark_udf
from onnxport.tracking.base import Model, RunAddress
from onnxport.tracking.mlflow import MlflowTracker

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
BATCH, PASSES = 10_000, 3
"""Rows per batch: what Spark gives to Python by default."""


class Network(nn.Module):
    """Two hidden layers."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (N, 10) for (N, features)."""
        return self.head(self.layers(features))


def register(folder: Path, features: int, width: int) -> str:
    """Put a model into a registry; return its address."""
    path = folder / "model.onnx"
    onnxport.export(
        Network(features, width), torch.randn(8, features), path, core="trace", verify=True
    )
    report = read_report(path)
    assert report is not None
    model = Model.of_file(path, report, Provenance())
    assert model is not None
    store = f"sqlite:///{folder / 'mlflow.db'}"
    root = (folder / "artifacts").as_uri()
    address = RunAddress(uri=store, artifact_root=root, options=MLflow(register="scored"))
    MlflowTracker(address).publish(model, last=False)
    return store


def write_table(folder: Path, rows: int, features: int) -> Path:
    """Write a table of random features, in files of 50,000 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "table").mkdir()
    for number, begin in enumerate(range(0, rows, 50_000)):
        count = min(50_000, rows - begin)
        values = pa.array(np.random.default_rng(number).standard_normal(count * features, "f4"))
        column = pa.ListArray.from_arrays(np.arange(count + 1, dtype="i4") * features, values)
        table = pa.table({"features": column})
        pq.write_table(table, folder / "table" / f"{number:04d}.parquet", row_group_size=BATCH)
    return folder / "table"


def seconds(work: Callable[[], None]) -> float:
    """Return how long the fastest of some passes takes, but the first one."""
    taken = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def by_loop(store: str, table: Path, features: int) -> float:
    """Score in a loop."""
    import onnxruntime as ort
    import pyarrow.dataset as ds

    mlflow.set_tracking_uri(store)
    path = mlflow.artifacts.download_artifacts("models:/scored@champion/model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def work() -> None:
        for batch in ds.dataset(table).to_batches(batch_size=BATCH):
            values = batch.column("features").flatten().to_numpy().reshape(-1, features)
            session.run(None, {"features": values})

    return seconds(work)


def by_spark(store: str, table: Path, executors: int) -> float:
    """Score with Spark."""
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    # Before the executors start: they ask the environment.
    os.environ["MLFLOW_TRACKING_URI"] = store
    spark = (
        SparkSession.builder.master(f"local-cluster[{executors},1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    try:
        predict = spark_udf(spark, "models:/scored@champion", tracking_uri=store)

        def work() -> None:
            scored = spark.read.parquet(str(table)).select(predict("features").alias("made"))
            scored.write.format("noop").mode("overwrite").save()

        return seconds(work)
    finally:
        spark.stop()


class Champion:
    """What an actor of Ray keeps: the model."""

    def __init__(self, store: str) -> None:
        mlflow.set_tracking_uri(store)
        self.model = mlflow.pyfunc.load_model("models:/scored@champion")

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Score a batch."""
        return dict(self.model.predict({"features": np.stack(batch["features"])}))


def by_ray(store: str, table: Path, rows: int, actors: int) -> float:
    """Score with Ray Data, which starts its actors for each dataset: from the first block on."""
    import ray

    ray.init(num_cpus=actors + 1, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def once() -> float:
        scored = ray.data.read_parquet(str(table), override_num_blocks=20).map_batches(
            Champion,
            fn_constructor_args=(store,),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
        )
        begin, first = 0.0, 0
        for blocks in scored.iter_internal_ref_bundles():
            if not begin:
                begin, first = time.perf_counter(), blocks.num_rows() or 0
        return (time.perf_counter() - begin) * rows / (rows - first)

    try:
        return min(once() for _ in range(PASSES))
    finally:
        ray.shutdown()


def table_of(content: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    layers = f"hidden layers of {content['width']}"
    lines = [
        "# Scoring a table with the champion",
        "",
        f"- {content['cpu']}, {content['cores']} cores, {content['memory']}",
        f"- Python {content['python']}; {versions}",
        f"- {content['date']}; {content['rows']:,} rows of {content['features']} numbers; {layers}",
        "",
        __doc__.split("\n\n", 2)[2].strip(),
        "",
        "| way | seconds | rows per second | x loop |",
        "|---|---|---|---|",
    ]
    plain = content["seconds"]["loop"]
    lines += [
        f"| {way} | {taken:.2f} | {content['rows'] / taken:,.0f} | {plain / taken:.2f} |"
        for way, taken in content["seconds"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    content: dict[str, Any] = about() | vars(options) | {"date": time.strftime("%Y-%m-%d")}
    for name in ("pyspark", "ray", "pyarrow", "mlflow"):
        content["versions"][name] = __import__(name).__version__
    with tempfile.TemporaryDirectory(prefix="onnxport-scoring-") as name:
        folder = Path(name)
        store = register(folder, options.features, options.width)
        table = write_table(folder, options.rows, options.features)
        found = {"loop": by_loop(store, table, options.features)}
        for count, plural in ((1, ""), (2, "s")):
            found[f"Spark, {count} executor{plural}"] = by_spark(store, table, count)
            found[f"Ray, {count} actor{plural}"] = by_ray(store, table, options.rows, count)
            print(found, flush=True)
    content["seconds"] = found
    (RESULTS / "scoring.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "scoring.md").write_text(table_of(content))
    print(table_of(content))


if __name__ == "__main__":
    main()
