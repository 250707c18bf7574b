"""Models of tables: pytorch_tabular and pytorch-tabnet."""

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

OBSERVED = ({"batch": 6},)
FRESH = ({"batch": 1}, {"batch": 3}, {"batch": 13})
REALS = 5
KINDS = (4, 6)
"""Values of each categorical column."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoIntModel": ("AutoIntConfig", {"attn_embed_dim": 8, "embedding_dim": 8}),
    "CategoryEmbeddingModel": ("CategoryEmbeddingModelConfig", {"layers": "16-8"}),
    "DANetModel": ("DANetConfig", {"n_layers": 2, "abstlay_dim_1": 8, "k": 3}),
    "FTTransformerModel": (
        "FTTransformerConfig",
        {"input_embed_dim": 16, "num_heads": 2, "num_attn_blocks": 2},
    ),
    "GANDALFModel": ("GANDALFConfig", {"gflu_stages": 3}),
    "GatedAdditiveTreeEnsembleModel": (
        "GatedAdditiveTreeEnsembleConfig",
        {"gflu_stages": 2, "num_trees": 3, "tree_depth": 3},
    ),
    "NODEModel": ("NodeConfig", {"num_trees": 16, "num_layers": 1, "depth": 3}),
    "TabNetModel": ("TabNetModelConfig", {"n_d": 4, "n_a": 4, "n_steps": 2}),
    "TabTransformerModel": (
        "TabTransformerConfig",
        {"input_embed_dim": 16, "num_heads": 2, "num_attn_blocks": 2},
    ),
}
"""Model, its class of options, options."""


def columns(*, batch: int) -> Example:
    """Return the dict that pytorch_tabular's data loader makes."""
    kinds = torch.stack([torch.randint(0, kinds, (batch,)) for kinds in KINDS], dim=1)
    return Example(({"continuous": torch.randn(batch, REALS), "categorical": kinds},))


def rows(*, batch: int) -> Example:
    """Return one table whose last columns hold the categories as numbers."""
    kinds = torch.stack([torch.randint(0, kinds, (batch,)) for kinds in KINDS], dim=1)
    return Example((torch.cat([torch.randn(batch, REALS), kinds.float()], dim=1),))


def _pytorch_tabular(name: str, config: str, options: dict[str, Any]) -> nn.Module:
    from omegaconf import OmegaConf
    from pytorch_tabular import models
    from pytorch_tabular.config import DataConfig, InferredConfig, OptimizerConfig, TrainerConfig

    parts = (
        DataConfig(
            target=["target"],
            continuous_cols=[f"real_{i}" for i in range(REALS)],
            categorical_cols=[f"kind_{i}" for i in range(len(KINDS))],
        ),
        TrainerConfig(),
        OptimizerConfig(),
        getattr(models, config)(task="regression", **options),
    )
    merged = OmegaConf.merge(
        *(OmegaConf.to_container(OmegaConf.structured(part)) for part in parts)
    )
    inferred = InferredConfig(
        categorical_dim=len(KINDS),
        continuous_dim=REALS,
        output_dim=1,
        categorical_cardinality=list(KINDS),
        embedding_dims=[(kinds, kinds // 2) for kinds in KINDS],
    )
    model: nn.Module = getattr(models, name)(
        config=merged, inferred_config=OmegaConf.structured(inferred)
    )
    # Some of these set their thresholds from the first rows that they see, as training would do.
    with torch.no_grad():
        first = columns(batch=64)
        model.eval()(*first.args, **first.kwargs)
    return model


def _tabnet(name: str, options: dict[str, Any]) -> nn.Module:
    networks = importlib.import_module("pytorch_tabnet.tab_network")
    places = list(range(REALS, REALS + len(KINDS)))
    width = REALS + len(KINDS)
    model: nn.Module = getattr(networks, name)(
        input_dim=width,
        n_d=4,
        n_a=4,
        n_steps=2,
        cat_idxs=places,
        cat_dims=list(KINDS),
        cat_emb_dim=[2] * len(KINDS),
        group_attention_matrix=torch.eye(width),
        **options,
    )
    return model


def pytorch_tabular_cases() -> list[Case]:
    importlib.import_module("pytorch_tabular.models")
    return [
        Case(
            name=f"pytorch-tabular/{name}",
            build=partial(_pytorch_tabular, name, config, options),
            call=columns,
            observed=OBSERVED,
            fresh=FRESH,
        )
        for name, (config, options) in MODELS.items()
    ]


def tabnet_cases() -> list[Case]:
    importlib.import_module("pytorch_tabnet.tab_network")
    return [
        Case(
            name=f"tabnet/{name}-{mask}",
            build=partial(_tabnet, name, {"output_dim": 3, "mask_type": mask}),
            call=rows,
            observed=OBSERVED,
            fresh=FRESH,
        )
        for name, mask in (("TabNet", "sparsemax"), ("TabNet", "entmax"))
    ]


def cases() -> list[Case]:
    return [*pytorch_tabular_cases(), *tabnet_cases()]
