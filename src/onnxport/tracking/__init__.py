"""Bring proven models to a tracking server, and decide which of them is served.

MLflow itself is imported when it is used: that takes seconds.
"""

from __future__ import annotations

from onnxport.tracking.people import promote, rollback
from onnxport.tracking.spark import spark_udf

__all__ = ["promote", "rollback", "spark_udf"]
