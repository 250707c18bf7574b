"""Networks for medical images in two and three dimensions, from MONAI."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from onnxport import Example
from zoo.base import Case, Sizes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cases"]

BATCHES = ({"batch": 1}, {"batch": 2}, {"batch": 5})
SHOWN_PLANES = ({"batch": 3, "height": 32, "width": 64}, {"batch": 3, "height": 64, "width": 32})
PLANES = (
    {"batch": 1, "height": 96, "width": 128},
    {"batch": 2, "height": 128, "width": 96},
    {"batch": 5, "height": 96, "width": 96},
)
SHOWN_SMALL = ({"batch": 3, "height": 16, "width": 24}, {"batch": 3, "height": 24, "width": 16})
SMALL = (
    {"batch": 1, "height": 8, "width": 32},
    {"batch": 2, "height": 32, "width": 8},
    {"batch": 5, "height": 32, "width": 32},
)
SHOWN_VOLUMES = (
    {"batch": 2, "depth": 16, "height": 32},
    {"batch": 2, "depth": 32, "height": 16},
)
VOLUMES = (
    {"batch": 1, "depth": 48, "height": 64},
    {"batch": 3, "depth": 64, "height": 48},
    {"batch": 4, "depth": 48, "height": 48},
)

UNET = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1}

PLANE: dict[str, dict[str, Any]] = {
    "AttentionUnet": {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "channels": (8, 16, 32),
        "strides": (2, 2),
    },
    "BasicUNet": {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "features": (8, 8, 16, 16, 32, 8),
    },
    "FlexibleUNet": {
        "in_channels": 3,
        "out_channels": 2,
        "backbone": "efficientnet-b0",
        "decoder_channels": (32, 16, 16, 8, 8),
    },
    "SegResNet": {"spatial_dims": 2, "init_filters": 8, "in_channels": 1, "out_channels": 2},
    "UNet": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **UNET},
    "VNet": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
}
"""Networks of planes of any size."""

VOLUME: dict[str, dict[str, Any]] = {
    "DynUNet": {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "filters": (8, 16, 16),
        "kernel_size": (3, 3, 3),
        "strides": (1, 2, 2),
        "upsample_kernel_size": (2, 2),
    },
    "HighResNet": {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "layer_params": (
            {"name": "conv_0", "n_features": 8, "kernel_size": 3},
            {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
    },
}
"""Networks of volumes of any size."""

FIXED: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    (
        "DenseNet",
        (1, 32, 32, 32),
        {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 2,
            "init_features": 16,
            "growth_rate": 8,
            "block_config": (2, 2),
        },
    ),
    (
        "SwinUNETR",
        (1, 64, 64),
        {
            "in_channels": 1,
            "out_channels": 2,
            "spatial_dims": 2,
            "feature_size": 12,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 4),
        },
    ),
    (
        "UNETR",
        (1, 32, 32, 16),
        {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": (32, 32, 16),
            "feature_size": 8,
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_heads": 4,
        },
    ),
    (
        "ViT",
        (1, 32, 32),
        {
            "in_channels": 1,
            "img_size": (32, 32),
            "patch_size": (8, 8),
            "spatial_dims": 2,
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_layers": 2,
            "num_heads": 4,
            "classification": True,
            "num_classes": 3,
        },
    ),
    (
        "VQVAE",
        (1, 32, 32),
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "channels": (8, 16),
            "num_res_channels": (8, 16),
            "num_res_layers": 1,
            "downsample_parameters": ((2, 4, 1, 1),) * 2,
            "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
            "num_embeddings": 16,
            "embedding_dim": 8,
        },
    ),
)
"""Class, shape of one image with its channels, options."""


def planes(*, batch: int, height: int, width: int, channels: int = 1) -> Example:
    return Example((torch.randn(batch, channels, height, width),))


def volumes(*, batch: int, depth: int, height: int) -> Example:
    return Example((torch.randn(batch, 1, depth, height, 16),))


def fixed(*, batch: int, shape: tuple[int, ...]) -> Example:
    return Example((torch.randn(batch, *shape),))


def denoised(*, batch: int, height: int, width: int) -> Example:
    return Example((torch.randn(batch, 1, height, width),), {"timesteps": torch.arange(batch)})


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(**options)
    return model


def _case(
    name: str,
    options: dict[str, Any],
    call: Any,
    observed: tuple[Sizes, ...],
    fresh: tuple[Sizes, ...],
) -> Case:
    return Case(
        name=f"monai/{name}",
        build=partial(_build, name, options),
        call=call,
        observed=observed,
        fresh=fresh,
    )


def cases() -> list[Case]:
    importlib.import_module("monai.networks.nets")
    found = []
    for name, options in PLANE.items():
        call = partial(planes, channels=options["in_channels"])
        found.append(_case(name, options, call, SHOWN_PLANES, PLANES))
    for name, options in VOLUME.items():
        found.append(_case(name, options, volumes, SHOWN_VOLUMES, VOLUMES))
    for name, shape, options in FIXED:
        found.append(_case(name, options, partial(fixed, shape=shape), ({"batch": 3},), BATCHES))
    diffusion = {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 1,
        "channels": (8, 16),
        "attention_levels": (False, True),
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "num_head_channels": 8,
    }
    name = "DiffusionModelUNet"
    found.append(_case(name, diffusion, denoised, SHOWN_SMALL, SMALL))
    return found
