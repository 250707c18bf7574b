"""The adapter for Lightning, under both of its names: ``lightning`` and ``pytorch_lightning``."""

from onnxport.callbacks.lightning.callback import OnnxExport

__all__ = ["OnnxExport"]
