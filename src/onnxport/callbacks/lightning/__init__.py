"""The adapter for Lightning, under both of its names: ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxport.callbacks.lightning.names import bound

if TYPE_CHECKING:
    from onnxport.callbacks.lightning.callback import OnnxExport

__all__ = ["OnnxExport"]


def __getattr__(name: str) -> Any:
    if name != "OnnxExport":
        raise AttributeError(f"module 'onnxport.callbacks.lightning' has no attribute {name!r}")
    from onnxport.callbacks.lightning import callback

    return bound(callback.OnnxExport)
