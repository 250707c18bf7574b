"""The folder that MLflow calls a model, made from a proven file without loading its weights."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxport._optional import optional_import

if TYPE_CHECKING:
    from onnxport.report import ExportReport
    from onnxport.signature import TensorSpec

__all__ = ["model_files_in_order", "model_signature", "package_model"]

DATA_SUFFIX = ".data"
COMMIT_MARKER = "MLmodel"


def model_signature(report: ExportReport) -> Any:
    """Return an MLflow signature with the graph's names; symbolic dimensions are -1.

    A named tensor signature keeps shapes in every REST format; without one MLflow flattens outputs
    (mlflow/mlflow#12539).
    """
    with optional_import(extra="mlflow", needed_for="MLflow tracking"):
        from mlflow.models import ModelSignature
        from mlflow.types.schema import Schema
        from mlflow.types.schema import TensorSpec as MlflowSpec

    def schema(specs: tuple[TensorSpec, ...]) -> Any:
        return Schema(
            [
                MlflowSpec(
                    np.dtype(spec.dtype),
                    tuple(-1 if isinstance(size, str) else size for size in spec.shape),
                    name=spec.name,
                )
                for spec in specs
            ]
        )

    return ModelSignature(schema(report.inputs), schema(report.outputs))


def package_model(report: ExportReport, folder: Path, logged_model: Any, run_id: str) -> None:
    """Write MLflow's ``onnx`` flavor around a published model.

    ``mlflow.onnx.save_model`` gets the bytes of the graph, so it neither loads external data nor
    empties a proto of ours; the data file is put beside it.

    Args:
        report: The report of the model.
        folder: Where to write; must not exist.
        logged_model: MLflow's entity, which gets the files.
        run_id: The run that it belongs to.
    """
    with optional_import(extra="mlflow", needed_for="MLflow tracking"):
        import mlflow.onnx
        from mlflow.models import Model

    source = Path(str(report.path))
    model = Model(
        model_id=logged_model.model_id,
        model_uuid=logged_model.model_id,
        run_id=run_id,
        artifact_path=logged_model.artifact_location,
    )
    mlflow.onnx.save_model(
        source.read_bytes(),
        str(folder),
        mlflow_model=model,
        signature=model_signature(report),
        pip_requirements=_requirements(),
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    data = source.with_name(source.name + DATA_SUFFIX)
    if data.exists():
        # A copy, not a link: onnx refuses external data with more than one hard link.
        shutil.copyfile(data, folder / data.name)
        model.model_size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        model.save(str(folder / COMMIT_MARKER))


def model_files_in_order(folder: Path) -> list[Path]:
    """Return the files to upload, ``MLmodel`` last: who sees it sees a whole model."""
    return sorted(folder.iterdir(), key=lambda file: (file.name == COMMIT_MARKER, file.name))


def _requirements() -> list[str]:
    """Pin what serving needs; giving them spares MLflow a subprocess of two seconds."""
    names = ("mlflow", "onnxruntime", "onnx", "numpy")
    return [f"{name}=={found}" for name in names if (found := _version(name)) is not None]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # e.g. onnxruntime-gpu or mlflow-skinny provide the module
        return None
