"""What execution providers are told, so that a proof is about the graph and leaves room to others.

Names and defaults are those of ONNX Runtime 1.24 and 1.32. CUDA, TensorRT, ROCm, MIGraphX and
CoreML are told what their documentation says; no machine that tests this has such a device.
"""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory", "memory_limit", "options_for"]

FREE_PART = 0.25
"""Of the GPU memory that is free when a session is made: training may still grow."""
UNKNOWN_LIMIT = 2**30
"""Bytes, where torch cannot say how much is free."""
MIB = 2**20

_LIMITED = {
    "CUDAExecutionProvider": ("gpu_mem_limit", "arena_extend_strategy"),
    "ROCMExecutionProvider": ("gpu_mem_limit", "arena_extend_strategy"),
    "MIGraphXExecutionProvider": ("migraphx_mem_limit", "migraphx_arena_extend_strategy"),
    "TensorrtExecutionProvider": ("trt_max_workspace_size", None),
}
"""Options that limit memory, and that say how an arena grows: by what is asked for, instead of to
the next power of two."""

_EXACT = {
    # TF32 keeps 10 bits of the mantissa: the proof is about the graph, not about that choice.
    "CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_use_max_workspace": "0"},
    # On processors that have it, bfloat16 is the default. Another device than the processor would
    # compute in half precision, and is asked for by its own options.
    "OpenVINOExecutionProvider": {"device_type": "CPU", "precision": "FP32"},
    # The older format computes in half precision on the GPU, and the neural engine knows no other.
    "CoreMLExecutionProvider": {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"},
}


def options_for(provider: str, *, threads: int | None, memory: int | None) -> dict[str, str]:
    """Return what a provider is told.

    Args:
        provider: Its name.
        threads: How many it may use, where it has threads of its own; ``None``: as it likes.
        memory: Bytes of GPU memory that it may take; ``None``: no limit.

    Example:
        >>> options_for("ROCMExecutionProvider", threads=1, memory=4096)
        {'gpu_mem_limit': '4096', 'arena_extend_strategy': 'kSameAsRequested'}
    """
    told = dict(_EXACT.get(provider, {}))
    if provider in _LIMITED and memory is not None:
        limit, growth = _LIMITED[provider]
        told[limit] = str(memory)
        if growth is not None:
            told[growth] = "kSameAsRequested"
    if provider == "OpenVINOExecutionProvider" and threads is not None:
        told["num_of_threads"] = str(threads)
    return told


def memory_limit(provider: str, wanted_mb: int | None) -> int | None:
    """Return how many bytes of GPU memory a session may take; ``None`` for what has no GPU.

    Args:
        provider: Name of the execution provider.
        wanted_mb: What the user has said, in MiB; ``None``: a quarter of what is free now.
    """
    if provider not in _LIMITED:
        return None
    if wanted_mb is not None:
        return wanted_mb * MIB
    free = _free_bytes()
    return UNKNOWN_LIMIT if free is None else int(free * FREE_PART)


def _free_bytes() -> int | None:
    """Ask torch; that opens the device, which the session is about to do in any case."""
    try:
        return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
    except RuntimeError:  # a driver that is too old, a device that is lost or full
        return None


_TOO_LITTLE = (
    "out of memory",
    "failed to allocate memory",
    "is smaller than requested bytes",
    "outofmemory",
    "cuda failure 2",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "bad_alloc",
)


def is_out_of_memory(text: str) -> bool:
    """Tell from what ONNX Runtime says whether too little memory was the reason.

    Example:
        >>> is_out_of_memory("CUDA failure 2: out of memory ; GPU=0"), is_out_of_memory("fails")
        (True, False)
    """
    lowered = text.lower()
    return any(sign in lowered for sign in _TOO_LITTLE)
