"""A table, scored with the champion on a real Spark session: ``make test-scale``."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from registered import register
from torch import nn

from onnxport import Inputs, TrackingError
from onnxport.tracking import spark_udf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("pyspark", reason="make test-scale installs it")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java", allow_module_level=True)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

ROWS = 200


class Two(nn.Module):
    """Integers and numbers in, logits and a label out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8 + 1, 3)

    def forward(self, ids: torch.Tensor, age: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.cat([self.table(ids).mean(1), age[:, None]], 1))
        return {"logits": logits, "label": logits.argmax(1)}


class Tokens(nn.Module):
    """A row of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).mean(1)


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    from pyspark.sql import SparkSession

    # Executors that are processes of their own, as on a cluster, with what is installed here.
    patch = pytest.MonkeyPatch()
    patch.setenv("PYSPARK_PYTHON", sys.executable)
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
        .getOrCreate()
    )
    yield session
    session.stop()
    patch.undo()


def test_a_table_scored_by_spark_is_what_pytorch_computes(
    spark: Any, store: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Two().eval()
    ids, age = torch.randint(0, 20, (ROWS, 5)), torch.rand(ROWS)
    register(store, tmp_path, module, {"ids": ids[:4], "age": age[:4]})
    predict = spark_udf(spark, "models:/scored@champion", tracking_uri=store)
    rows = [(i, ids[i].tolist(), float(age[i])) for i in range(ROWS)]
    table = spark.createDataFrame(rows, "n int, ids array<bigint>, age float").repartition(4)
    scored = table.withColumn("out", predict("ids", "age"))
    assert scored.schema["out"].dataType.simpleString() == (
        "struct<logits:array<float>,label:bigint>"
    )
    found = {row.n: row.out for row in scored.collect()}
    with torch.no_grad():
        expected = module(ids, age)
    logits = np.array([found[i].logits for i in range(ROWS)], dtype=np.float32)
    np.testing.assert_allclose(logits, expected["logits"].numpy(), rtol=1e-4, atol=1e-5)
    assert [found[i].label for i in range(ROWS)] == expected["label"].tolist()


def test_what_cannot_be_a_column_is_said(spark: Any, store: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 20, (3, 5))
    axes = {"ids": {0: "batch", 1: "length"}}
    register(store, tmp_path, Tokens().eval(), {"ids": ids}, inputs=Inputs(dynamic_axes=axes))
    with pytest.raises(TrackingError, match=r"'ids' of shape \(-1, -1\) cannot be a Spark column"):
        spark_udf(spark, "models:/scored@champion", tracking_uri=store)
