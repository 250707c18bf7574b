"""A table, scored with the champion on Ray Data: ``make test-scale``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import torch
from registered import register
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ray = pytest.importorskip("ray", reason="make test-scale installs it")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

ROWS = 200


def champion_of(store: str) -> type:
    """Return the class of the documentation; by value, because Ray's processes know no test."""

    class Champion:
        def __init__(self) -> None:
            mlflow.set_tracking_uri(store)
            self.model = mlflow.pyfunc.load_model("models:/scored@champion")

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"n": batch["n"], **self.model.predict({"input": batch["input"]})}

    return Champion


@pytest.fixture
def cluster() -> Iterator[None]:
    before = dict(os.environ)  # Ray writes to it
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_a_table_scored_by_ray_is_what_pytorch_computes(
    cluster: None, store: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, rows = nn.Linear(6, 3).eval(), torch.randn(ROWS, 6)
    register(store, tmp_path, module, {"input": rows[:4]})
    table = ray.data.from_items([{"n": n, "input": row} for n, row in enumerate(rows.numpy())])
    two = ray.data.ActorPoolStrategy(size=2)
    scored = table.repartition(4).map_batches(
        champion_of(store), batch_size=32, compute=two, num_cpus=1
    )
    made = {row["n"]: row["output"] for row in scored.take_all()}
    with torch.no_grad():
        expected = module(rows).numpy()
    found = np.stack([made[n] for n in range(ROWS)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
