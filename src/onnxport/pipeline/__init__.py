"""The only orchestration: plan, export, prove, publish. Values in, a report out.

The same functions run inside the training process and anywhere else: nothing here knows a training
framework, and a job holds all that is needed.
"""

from onnxport.pipeline.job import (
    CheckpointGoneError,
    ExportJob,
    GivenModule,
    LiveReference,
    ModuleMissingError,
    ModuleSource,
    SourceLostError,
    Validation,
)
from onnxport.pipeline.run import Pipeline

__all__ = [
    "CheckpointGoneError",
    "ExportJob",
    "GivenModule",
    "LiveReference",
    "ModuleMissingError",
    "ModuleSource",
    "Pipeline",
    "SourceLostError",
    "Validation",
]
