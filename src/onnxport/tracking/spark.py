"""A model of the registry as a function of Spark columns."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from onnxport._optional import optional_import
from onnxport.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["result_type_of", "spark_udf"]

_TYPES = {
    "float16": "FloatType",
    "float32": "FloatType",
    "float64": "DoubleType",
    "int8": "IntegerType",
    "int16": "IntegerType",
    "int32": "IntegerType",
    "uint8": "IntegerType",
    "uint16": "IntegerType",
    "int64": "LongType",
    "uint32": "LongType",
    "bool": "BooleanType",
    "str": "StringType",
}
"""Spark's type of each dtype of NumPy; unsigned ones get the next larger type."""
MOST_AXES = 2
"""MLflow makes a Spark column of outputs of one number, or one list of numbers, per row."""


def spark_udf(
    spark: Any,
    model_uri: str,
    *,
    tracking_uri: str | None = None,
    env_manager: str = "local",
    **options: Any,
) -> Any:
    """Return a function of Spark columns that scores them with a model of the registry.

    Its result is a struct with one field per output of the model: a number per row, or an array.
    Left to itself, MLflow takes the shape of the whole batch for a row's (mlflow/mlflow#8173).

    Args:
        spark: A ``SparkSession``.
        model_uri: ``"models:/<name>@champion"``, or any other address of a model.
        tracking_uri: Address of MLflow; default: ``MLFLOW_TRACKING_URI``.
        env_manager: ``"local"``: executors have what the model requires; or see
            ``mlflow.pyfunc.spark_udf``.
        options: Others of ``mlflow.pyfunc.spark_udf``.

    Returns:
        A function of one column per input, which holds a number, or an array of the flat values
        of a row.

    Raises:
        MissingDependencyError: If MLflow or pyspark is not installed.
        TrackingError: If an input or output cannot be a Spark column, in a sentence.

    Example:
        >>> from onnxport.tracking import spark_udf
        >>> predict = spark_udf(spark, "models:/digits@champion")  # doctest: +SKIP
        >>> table.select(predict("image").logits)  # doctest: +SKIP
    """
    with optional_import(extra="mlflow", needed_for="A Spark UDF"):
        import mlflow
        from mlflow.models import get_model_info
    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
        # Executors of a local session are children that ask the environment.
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    signature = get_model_info(model_uri).signature
    if signature is None:
        raise TrackingError(f"{model_uri} has no signature: it was not logged by onnxport.")
    for spec in signature.inputs.inputs:
        _require_rows(spec)
    result_type = result_type_of(signature.outputs.inputs)
    return mlflow.pyfunc.spark_udf(
        spark, model_uri, result_type=result_type, env_manager=env_manager, **options
    )


def result_type_of(outputs: Sequence[Any]) -> Any:
    """Return the Spark type of a row of outputs.

    Args:
        outputs: Specs of tensors, from a signature of MLflow.

    Raises:
        MissingDependencyError: If pyspark is not installed.
        TrackingError: If an output has no Spark type, or more than two axes.
    """
    with optional_import(extra="spark", needed_for="A Spark UDF"):
        from pyspark.sql import types
    fields = []
    for spec in outputs:
        name = _TYPES.get(spec.type.name)
        if name is None or len(spec.shape) > MOST_AXES or not spec.shape or spec.shape[0] != -1:
            raise TrackingError(
                f"The output {spec.name!r} of {spec.type} and shape {spec.shape} cannot be a Spark "
                "column: a row must be a number or a list of numbers. A wrapper (target=) can give "
                "such outputs."
            )
        kind = getattr(types, name)()
        if len(spec.shape) == MOST_AXES:
            kind = types.ArrayType(kind)
        fields.append(types.StructField(spec.name, kind))
    return types.StructType(fields)


def _require_rows(spec: Any) -> None:
    """Make sure that a column can hold an input.

    Raises:
        TrackingError: If its rows are not all of one size.
    """
    if not spec.shape or spec.shape[0] != -1 or -1 in spec.shape[1:]:
        raise TrackingError(
            f"The input {spec.name!r} of shape {spec.shape} cannot be a Spark column: the rows of "
            "a table are independent, and of one size. Fix the axis with Inputs(dynamic_axes=)."
        )
