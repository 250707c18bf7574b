"""Let torchvision be imported beside a torch that its compiled part was not built for.

torchvision's wheel on the package index needs the CUDA build of torch. Beside the CPU build its
operators are missing, and its import, and with it Lightning's and transformers', ends in "operator
torchvision::nms does not exist". No model of the zoo uses these operators: it is enough that they
have a signature. This file is copied into the zoo's environment with a ``.pth`` file that imports
it at start, so that exports in child processes have it as well.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

__all__ = ["Operators"]


class Operators(MetaPathFinder):
    """Define the operators that torchvision's import asks for, when it is first imported."""

    def __init__(self) -> None:
        self.libraries = []

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        """Find nothing, but be asked before the finder that does."""
        if fullname != "torchvision" or self.libraries:
            return
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
            "int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
        )
        self.libraries.append(library)


sys.meta_path.insert(0, Operators())
