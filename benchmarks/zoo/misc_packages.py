"""Layers and models of smaller packages, used as their documentation uses them."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport import Example
from zoo.base import Case

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["cases"]

SHOWN_SEQUENCES = ({"batch": 3, "sequence": 12}, {"batch": 3, "sequence": 17})
SEQUENCES = (
    {"batch": 1, "sequence": 9},
    {"batch": 2, "sequence": 25},
    {"batch": 5, "sequence": 9},
)
SHOWN_BATCH = ({"batch": 4},)
BATCHES = ({"batch": 1}, {"batch": 3}, {"batch": 7})
TOKENS = 32
WIDTH = 16

QUANTIZERS: dict[str, dict[str, Any]] = {
    "FSQ": {"levels": [8, 5, 5]},
    "LFQ": {"codebook_size": 16, "dim": WIDTH, "entropy_loss_weight": 0.1},
    "ResidualVQ": {"dim": WIDTH, "num_quantizers": 2, "codebook_size": 16},
    "SimVQ": {"dim": WIDTH, "codebook_size": 16},
    "VectorQuantize": {"dim": WIDTH, "codebook_size": 16, "decay": 0.8},
}


class Keywords(nn.Module):
    """A module whose forward takes fixed keyword arguments besides its input."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module = module
        self.options = options

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return what the module returns."""
        return self.module(*inputs, **self.options)


class Patches(nn.Module):
    """A mixer made of einops' layers, and einsum and pack in its forward."""

    def __init__(self) -> None:
        super().__init__()
        layers = importlib.import_module("einops.layers.torch")
        self.patch = nn.Sequential(
            layers.Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8),
            nn.Linear(8 * 8 * 3, WIDTH),
        )
        self.mix = layers.EinMix("b n d -> b m d", weight_shape="n m", bias_shape="m", n=16, m=8)
        self.pool = layers.Reduce("b m d -> b d", "mean")
        self.cls = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features with a learned token mixed in."""
        einops = importlib.import_module("einops")
        tokens = self.mix(self.patch(images))
        cls = einops.repeat(self.cls, "d -> b d", b=tokens.shape[0])
        packed, shapes = einops.pack([cls, tokens], "b * d")
        cls, tokens = einops.unpack(packed, shapes, "b * d")
        return self.pool(tokens) + einops.einsum(cls, tokens, "b d, b m d -> b d")


class Judged(nn.Module):
    """A regressor that returns torchmetrics of its prediction next to it."""

    def __init__(self) -> None:
        super().__init__()
        metrics = importlib.import_module("torchmetrics")
        self.net = nn.Linear(8, 1)
        self.error = metrics.MeanAbsoluteError()
        self.similarity = importlib.import_module("torchmetrics.functional").cosine_similarity

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the prediction, its error and its similarity to the target, row by row."""
        prediction = self.net(x)
        return {
            "prediction": prediction,
            "error": self.error(prediction, target),
            "similarity": self.similarity(prediction, target, reduction="none"),
        }


class Equivariant(nn.Module):
    """Messages between points that rotate with them, from e3nn."""

    def __init__(self) -> None:
        super().__init__()
        o3 = importlib.import_module("e3nn.o3")
        networks = importlib.import_module("e3nn.nn")
        self.inside = o3.Irreps("4x0e + 2x1o")
        self.sphere = o3.Irreps.spherical_harmonics(2)
        self.harmonics = o3.SphericalHarmonics(
            self.sphere, normalize=True, normalization="component"
        )
        self.product = o3.FullyConnectedTensorProduct(
            self.inside, self.sphere, self.inside, shared_weights=False
        )
        self.weights = networks.FullyConnectedNet(
            [3, 8, self.product.weight_numel], torch.nn.functional.silu
        )
        self.out = o3.Linear(self.inside, o3.Irreps("1x0e"))

    def forward(self, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return an energy for each pair of features and relative position."""
        distance = positions.norm(dim=-1, keepdim=True)
        radial = torch.cat([distance, distance**2, torch.exp(-distance)], dim=-1)
        message = self.product(features, self.harmonics(positions), self.weights(radial))
        energy: torch.Tensor = self.out(message)
        return energy


class Genes(nn.Module):
    """scvi's encoder and decoder at the mean of the latent distribution."""

    def __init__(self) -> None:
        super().__init__()
        networks = importlib.import_module("scvi.nn")
        self.encoder = networks.Encoder(20, 4, n_cat_list=[2], n_hidden=16)
        self.decoder = networks.DecoderSCVI(4, 20, n_cat_list=[2], n_hidden=16)

    def forward(self, counts: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return scale, rate and dropout of the counts."""
        mean, _, _ = self.encoder(torch.log1p(counts), sample)
        library = counts.sum(1, keepdim=True).log()
        scale, _, rate, dropout = self.decoder("gene", mean, library, sample)
        return scale, rate, dropout


def tokens(*, batch: int, sequence: int) -> Example:
    return Example((torch.randint(0, TOKENS, (batch, sequence)),))


def masked(*, batch: int, sequence: int) -> Example:
    mask = torch.arange(sequence) < torch.randint(3, sequence + 1, (batch, 1))
    return Example((torch.randint(0, TOKENS, (batch, sequence)),), {"mask": mask})


def vectors(*, batch: int, sequence: int, width: int = WIDTH) -> Example:
    return Example((torch.randn(batch, sequence, width),))


def images(*, batch: int) -> Example:
    return Example((torch.randn(batch, 3, 32, 32),))


def pairs(*, batch: int) -> Example:
    return Example((torch.randn(batch, 8), torch.randn(batch, 1)))


def points(*, batch: int) -> Example:
    return Example((torch.randn(batch, 10), torch.randn(batch, 3)))


def counts(*, batch: int) -> Example:
    return Example((torch.randint(1, 9, (batch, 20)).float(), torch.randint(0, 2, (batch, 1))))


def _transformer(
    wrapper: str, attention: str, wrapping: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    package = importlib.import_module("x_transformers")
    layers = getattr(package, attention)(dim=WIDTH, depth=2, heads=2, attn_dim_head=8, **options)
    model: nn.Module = getattr(package, wrapper)(attn_layers=layers, **wrapping)
    return model


def _quantizer(name: str, options: dict[str, Any]) -> nn.Module:
    module = getattr(importlib.import_module("vector_quantize_pytorch"), name)(**options)
    if name == "FSQ":
        return nn.Sequential(nn.Linear(WIDTH, 3), module)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), module)


def _autoregressive() -> nn.Module:
    networks = importlib.import_module("pyro.nn")
    model: nn.Module = networks.ConditionalAutoRegressiveNN(1, 8, [16], param_dims=(1, 1))
    return model


def conditioned(*, batch: int) -> Example:
    return Example((torch.randn(batch, 8),), {"context": torch.randn(batch, 1)})


def transformer_cases() -> list[Case]:
    importlib.import_module("x_transformers")
    text = {"num_tokens": TOKENS, "max_seq_len": 64}
    table: dict[str, tuple[Callable[[], nn.Module], Callable[..., Example]]] = {
        "Decoder-rotary": (
            partial(
                _transformer,
                *("TransformerWrapper", "Decoder", text),
                {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True},
            ),
            tokens,
        ),
        "Decoder-alibi": (
            partial(
                _transformer,
                *("TransformerWrapper", "Decoder", text),
                {"alibi_pos_bias": True, "attn_kv_heads": 1},
            ),
            tokens,
        ),
        "Encoder": (
            partial(_transformer, "TransformerWrapper", "Encoder", text, {"attn_flash": True}),
            masked,
        ),
        "ContinuousEncoder": (
            partial(
                _transformer,
                *("ContinuousTransformerWrapper", "Encoder"),
                {"dim_in": WIDTH, "dim_out": 4, "max_seq_len": 64},
                {"rel_pos_bias": True},
            ),
            vectors,
        ),
    }
    return [
        Case(
            name=f"x-transformers/{name}",
            build=build,
            call=call,
            observed=SHOWN_SEQUENCES,
            fresh=SEQUENCES,
        )
        for name, (build, call) in table.items()
    ]


def quantizer_cases() -> list[Case]:
    importlib.import_module("vector_quantize_pytorch")
    return [
        Case(
            name=f"vector-quantize/{name}",
            build=partial(_quantizer, name, options),
            call=vectors,
            observed=SHOWN_SEQUENCES,
            fresh=SEQUENCES,
        )
        for name, options in QUANTIZERS.items()
    ]


def other_cases() -> list[Case]:
    for package in ("einops", "torchmetrics", "e3nn.o3", "scvi.nn", "pyro.nn"):
        importlib.import_module(package)
    vit = partial(
        _transformer,
        *("ViTransformerWrapper", "Encoder"),
        {"image_size": 32, "patch_size": 8, "num_classes": 5},
        {},
    )
    table: dict[str, tuple[Callable[[], nn.Module], Callable[..., Example]]] = {
        "x-transformers/ViT": (vit, images),
        "einops/Patches": (Patches, images),
        "torchmetrics/Judged": (Judged, pairs),
        "e3nn/Equivariant": (Equivariant, points),
        "scvi/Genes": (Genes, counts),
        "pyro/ConditionalAutoRegressiveNN": (_autoregressive, conditioned),
    }
    return [
        Case(name=name, build=build, call=call, observed=SHOWN_BATCH, fresh=BATCHES)
        for name, (build, call) in table.items()
    ]


def cases() -> list[Case]:
    return [*transformer_cases(), *quantizer_cases(), *other_cases()]
