"""Fixtures of all tests: determinism, and nothing left behind."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from servers import mlflow_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What Lightning, torch and MLflow's fluent API set for their child processes.
_MAY_CHANGE = {
    "PYTEST_CURRENT_TEST",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_MODULE_LOADING",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TRITON_CACHE_DIR",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "_MLFLOW_TELEMETRY_SESSION_ID",
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_memory(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Which rung won in another test or run must not decide what this one tries first.
    monkeypatch.setenv("ONNXPORT_CACHE_DIR", str(tmp_path_factory.mktemp("memory")))
    # Drawing a page takes seconds; the tests of it ask for one.
    if "ONNXPORT_PAGE" not in os.environ:
        monkeypatch.setenv("ONNXPORT_PAGE", "0")
    # A worker's start takes seconds; what is not about the worker needs none.
    everywhere = "ONNXPORT_TEST_WORKER" in os.environ
    if request.node.get_closest_marker("worker") is None and not everywhere:
        monkeypatch.setenv("ONNXPORT_BACKGROUND", "0")


@pytest.fixture(autouse=True)
def _no_environment_leak() -> Iterator[None]:
    before = dict(os.environ)
    yield
    changed = {k for k in before.keys() | os.environ if before.get(k) != os.environ.get(k)}
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    assert not changed - _MAY_CHANGE, f"leaked environment variables: {changed - _MAY_CHANGE}"


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty store: making one takes seconds, copying it takes none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(mlflow_database: Path, tmp_path: Path) -> str:
    """The address of a fresh sqlite store."""
    shutil.copyfile(mlflow_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def server(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(mlflow_database, folder / "mlflow.db")
    with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder) as uri:
        yield uri
