"""The folder that MLflow calls a model, made around a proven file without reading its weights."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxport._files import DATA_SUFFIX
from onnxport._optional import optional_import

if TYPE_CHECKING:
    from pathlib import Path

    from onnxport.report import ExportReport
    from onnxport.signature import TensorSpec
    from onnxport.tracking.base import Model

__all__ = ["model_files_in_order", "model_signature", "package_model", "weights_of"]

MODEL = "model.onnx"
COMMIT_MARKER = "MLmodel"
SESSION_OPTIONS = {
    # A server has a process for each core; if each of these took all cores, they would wait for
    # one another.
    "intra_op_num_threads": 1,
    "inter_op_num_threads": 1,
    "execution_mode": "sequential",
}
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


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


def package_model(model: Model, folder: Path, logged_model: Any, run_id: str) -> None:
    """Write MLflow's ``onnx`` flavor around a published model.

    MLflow gets a graph without weights, or none, so it neither loads nor copies them. What holds
    the weights is linked to where it lies: the folder is to be uploaded, and then thrown away.

    Args:
        model: The model.
        folder: Where to write; must not exist.
        logged_model: MLflow's entity, which gets the files.
        run_id: The run that it belongs to.
    """
    with optional_import(extra="mlflow", needed_for="MLflow tracking"):
        import mlflow.models
        import mlflow.onnx

    weights, name = weights_of(model.path)
    graph = b"" if name == MODEL else _graph_at(model.path.resolve(), name)
    described = mlflow.models.Model(
        model_id=logged_model.model_id,
        model_uuid=logged_model.model_id,
        run_id=run_id,
        artifact_path=logged_model.artifact_location,
    )
    mlflow.onnx.save_model(
        graph,
        str(folder),
        mlflow_model=described,
        signature=model_signature(model.report),
        input_example=None if model.row is None else dict(model.row),
        pip_requirements=_requirements(),
        onnx_execution_providers=["CPUExecutionProvider"],
        onnx_session_options=SESSION_OPTIONS,
        save_as_external_data=False,
    )
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(weights)
    for companion in model.companions:
        if not (folder / companion.name).exists():  # MLflow's own requirements.txt, say
            (folder / companion.name).symlink_to(companion)
    described.model_size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    described.save(str(folder / COMMIT_MARKER))


def weights_of(path: Path) -> tuple[Path, str]:
    """Return the file that holds a model's weights, and its name in MLflow's folder.

    Args:
        path: The model.
    """
    source = path.resolve()
    data = source.with_name(source.name + DATA_SUFFIX)
    return (data, MODEL + DATA_SUFFIX) if data.exists() else (source, MODEL)


def model_files_in_order(folder: Path) -> list[Path]:
    """Return the files to upload, ``MLmodel`` last: who sees it sees a whole model."""
    return sorted(folder.iterdir(), key=lambda file: (file.name == COMMIT_MARKER, file.name))


def _graph_at(source: Path, location: str) -> bytes:
    """Read a graph whose weights are in another file, and let it look for them under a fixed name.

    Names with ``#``, ``?`` or ``%`` are cut off on the way to a server (mlflow 3.17).
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    graph = onnx.load(source, load_external_data=False)
    for tensor in graph.graph.initializer:
        if uses_external_data(tensor):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
    return bytes(graph.SerializeToString())


def _requirements() -> list[str]:
    """Pin what serving needs; giving them spares MLflow a subprocess of two seconds."""
    pins = {name: _version(name) for name in ("mlflow", "onnx", "numpy")}
    # Serving runs on the CPU; every kind of ONNX Runtime has the version of the plain one.
    pins["onnxruntime"] = next(filter(None, map(_version, _RUNTIMES)), None)
    return [f"{name}=={found}" for name, found in pins.items() if found is not None]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # e.g. mlflow-skinny provides the module mlflow
        return None
