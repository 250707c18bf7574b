"""Image classifiers, detectors' backbones and segmenters: timm, torchvision, segmentation-models.

Widths and sizes are the architectures' own smallest; ``depth`` is cut where that is allowed.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from onnxport import Example
from zoo.base import Case

if TYPE_CHECKING:
    from torch import nn

__all__ = ["cases"]

BATCHES = ({"batch": 1}, {"batch": 2}, {"batch": 5})
IMAGES = (
    {"batch": 1, "height": 64, "width": 96},
    {"batch": 2, "height": 128, "width": 96},
    {"batch": 4, "height": 64, "width": 128},
)
SHOWN_IMAGES = (
    {"batch": 3, "height": 32, "width": 64},
    {"batch": 3, "height": 96, "width": 32},
)

TIMM: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("beitv2_base_patch16_224", 64, {"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads": 3}),
    ("cait_xxs24_224", 64, {"depth": 3, "img_size": 64}),
    ("coat_lite_tiny", 64, {"img_size": 64}),
    ("convit_tiny", 64, {"depth": 4, "local_up_to_layer": 2, "img_size": 64}),
    ("convnextv2_atto", 64, {"depths": (1, 1, 2, 1)}),
    ("crossvit_tiny_240", 240, {"depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))}),
    ("davit_tiny", 64, {"depths": (1, 1, 1, 1)}),
    ("deit_tiny_distilled_patch16_224", 64, {"depth": 4, "img_size": 64}),
    ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),
    ("edgenext_xx_small", 64, {}),
    ("efficientformer_l1", 224, {"depths": (1, 1, 2, 2)}),
    ("efficientnet_b0", 64, {}),
    ("efficientvit_b0", 64, {}),
    ("eva02_tiny_patch14_224", 56, {"depth": 3, "img_size": 56}),
    ("fastvit_t8", 64, {}),
    ("ghostnet_050", 64, {}),
    ("gmlp_ti16_224", 64, {"img_size": 64}),
    ("hgnetv2_b0", 64, {}),
    ("levit_128s", 224, {}),
    ("mambaout_femto", 64, {"depths": (1, 1, 2, 1)}),
    ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    ("mixer_s32_224", 64, {"img_size": 64}),
    ("mobilevitv2_050", 64, {}),
    ("nf_regnet_b0", 64, {}),
    ("pit_ti_224", 96, {"img_size": 96}),
    ("poolformer_s12", 64, {}),
    ("pvt_v2_b0", 64, {}),
    ("regnety_002", 64, {}),
    ("repvgg_a0", 64, {}),
    ("sequencer2d_s", 64, {"layers": (1, 1, 1, 1), "img_size": 64}),
    ("swin_tiny_patch4_window7_224", 56, {"depths": (1, 2), "num_heads": (3, 6), "img_size": 56}),
    ("swinv2_cr_tiny_224", 64, {"depths": (1, 2), "num_heads": (3, 6), "img_size": 64}),
    ("tnt_s_legacy_patch16_224", 64, {"depth": 2, "img_size": 64}),
    ("twins_svt_small", 64, {"depths": (1, 1, 1, 1), "img_size": 64}),
    ("visformer_tiny", 64, {"img_size": 64}),
    ("vit_relpos_small_patch16_224", 64, {"depth": 2, "img_size": 64, "embed_dim": 96}),
    ("volo_d1_224", 64, {"img_size": 64}),
    ("xcit_nano_12_p16_224", 64, {"depth": 3}),
)
"""Name, height and width of the images, options of the constructor."""

TIMM_ANY_SIZE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("convnext_atto", {"depths": (1, 1, 2, 1)}),
    ("mobilenetv3_small_050", {}),
    ("mobilevit_xxs", {}),
    ("resnet18", {}),
    ("vit_tiny_patch16_224", {"depth": 3, "dynamic_img_size": True}),
)
"""Models trained on images of several sizes."""

TORCHVISION = (*("googlenet", "mnasnet0_5", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"),)

TORCHVISION_CLASSES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "MaxVit",
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 2,
            "head_dim": 16,
            "block_channels": [16, 32],
            "block_layers": [1, 1],
            "stochastic_depth_prob": 0.1,
            "num_classes": 10,
        },
    ),
    (
        "SwinTransformer",
        {
            "patch_size": [4, 4],
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": [4, 4],
            "num_classes": 10,
        },
    ),
    (
        "VisionTransformer",
        {
            "image_size": 64,
            "patch_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 32,
            "mlp_dim": 64,
            "num_classes": 10,
        },
    ),
)
"""Class and its options."""

SEGMENTERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("deeplabv3", "resnet18", {"decoder_channels": 32}),
    ("deeplabv3plus", "mobilenet_v2", {}),
    ("fpn", "resnet18", {}),
    ("linknet", "resnet18", {}),
    ("manet", "resnet18", {}),
    ("pspnet", "resnet18", {}),
    ("segformer", "mit_b0", {}),
    ("unet", "resnet18", {"decoder_attention_type": "scse"}),
    ("unetplusplus", "mobilenet_v2", {"decoder_channels": (64, 32, 32, 16, 8)}),
    ("upernet", "resnet18", {"decoder_channels": 32}),
)
"""Architecture, encoder, options."""


def images(*, batch: int, height: int = 64, width: int | None = None) -> Example:
    return Example((torch.randn(batch, 3, height, width or height),))


def clips(*, batch: int, frames: int = 4) -> Example:
    return Example((torch.randn(batch, 3, frames, 32, 32),))


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    model: nn.Module = models.get_model(name, weights=None, num_classes=10, **options)
    return model


def _torchvision_class(name: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module("torchvision.models"), name)(**options)
    return model


def _segmenter(arch: str, encoder: str, options: dict[str, Any]) -> nn.Module:
    smp = importlib.import_module("segmentation_models_pytorch")
    model: nn.Module = smp.create_model(
        arch, encoder_name=encoder, encoder_weights=None, classes=2, **options
    )
    return model


def timm_cases() -> list[Case]:
    fixed = [
        Case(
            name=f"timm/{name}",
            build=partial(_timm, name, options),
            call=partial(images, height=size),
            observed=({"batch": 3},),
            fresh=BATCHES,
        )
        for name, size, options in TIMM
    ]
    return fixed + [
        Case(
            name=f"timm/{name}",
            build=partial(_timm, name, options),
            call=images,
            observed=SHOWN_IMAGES,
            fresh=IMAGES,
        )
        for name, options in TIMM_ANY_SIZE
    ]


def torchvision_cases() -> list[Case]:
    found = []
    for name in TORCHVISION:
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        found.append(
            Case(
                name=f"torchvision/{name}",
                build=partial(_torchvision, name, options),
                call=images,
                observed=({"batch": 3},),
                fresh=BATCHES,
            )
        )
    small = [
        Case(
            name=f"torchvision/{name}",
            build=partial(_torchvision_class, name, options),
            call=images,
            observed=({"batch": 3},),
            fresh=BATCHES,
        )
        for name, options in TORCHVISION_CLASSES
    ]
    lraspp = Case(
        name="torchvision/lraspp_mobilenet_v3_large",
        build=partial(_torchvision, "lraspp_mobilenet_v3_large", {"weights_backbone": None}),
        call=images,
        observed=SHOWN_IMAGES,
        fresh=IMAGES,
    )
    video = Case(
        name="torchvision/mc3_18",
        build=partial(_torchvision, "mc3_18", {}),
        call=clips,
        observed=({"batch": 3, "frames": 4}, {"batch": 3, "frames": 6}),
        fresh=(
            {"batch": 1, "frames": 8},
            {"batch": 2, "frames": 5},
            {"batch": 5, "frames": 8},
        ),
    )
    return [*found, *small, lraspp, video]


def segmentation_cases() -> list[Case]:
    return [
        Case(
            name=f"segmentation/{arch}",
            build=partial(_segmenter, arch, encoder, options),
            call=images,
            observed=SHOWN_IMAGES,
            fresh=IMAGES,
        )
        for arch, encoder, options in SEGMENTERS
    ]


def cases() -> list[Case]:
    importlib.import_module("torchvision")
    importlib.import_module("timm")
    importlib.import_module("segmentation_models_pytorch")
    return [*timm_cases(), *torchvision_cases(), *segmentation_cases()]
