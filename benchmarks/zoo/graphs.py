"""Graph networks from PyTorch Geometric: the numbers of nodes and of edges vary."""

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

OBSERVED = ({"nodes": 12, "edges": 30}, {"nodes": 17, "edges": 44})
FRESH = ({"nodes": 5, "edges": 9}, {"nodes": 23, "edges": 61}, {"nodes": 40, "edges": 18})

MODELS: dict[str, dict[str, Any]] = {
    "GAT": {"heads": 2, "v2": True},
    "GCN": {},
    "GIN": {},
    "GraphSAGE": {"jk": "cat"},
    "PNA": {
        "aggregators": ["mean", "max", "std"],
        "scalers": ["identity", "amplification"],
        "deg": torch.tensor([1, 4, 6, 3]),
    },
}
"""Node models and their options besides the widths."""


class Pooled(nn.Module):
    """A model of nodes, and the mean of its nodes for each graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(8, 3)

    def forward(
        self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor
    ) -> torch.Tensor:
        """Return logits, one row for each graph."""
        pool = importlib.import_module("torch_geometric.nn").global_mean_pool
        logits: torch.Tensor = self.head(pool(self.model(x, edge_index), batch))
        return logits


class Stack(nn.Module):
    """Convolutions one after the other, with what they take besides the nodes."""

    def __init__(self, convs: list[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: torch.Tensor, *edges: torch.Tensor) -> torch.Tensor:
        """Return the features of nodes."""
        for conv in self.convs:
            x = torch.relu(conv(x, *edges))
        return x


class LinkScore(nn.Module):
    """Scores of all edges from the features of their ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        """Return one score for each edge."""
        features = self.model(x, edge_index)
        return (features[edge_index[0]] * features[edge_index[1]]).sum(-1)


def _edges(nodes: int, edges: int) -> torch.Tensor:
    return torch.randint(0, nodes, (2, edges))


def plain(*, nodes: int, edges: int) -> Example:
    return Example((torch.randn(nodes, 8), _edges(nodes, edges)))


def attributed(*, nodes: int, edges: int, width: int = 4) -> Example:
    return Example((torch.randn(nodes, 8), _edges(nodes, edges), torch.rand(edges, width)))


def typed(*, nodes: int, edges: int) -> Example:
    kinds = torch.randint(0, 3, (edges,))
    return Example((torch.randn(nodes, 8), _edges(nodes, edges), kinds))


def batched(*, nodes: int, edges: int) -> Example:
    """Return two graphs: the first has a third of the nodes."""
    batch = (torch.arange(nodes) >= nodes // 3).long()
    return Example((torch.randn(nodes, 8), _edges(nodes, edges)), {"batch": batch})


def _basic(name: str, options: dict[str, Any]) -> nn.Module:
    models = importlib.import_module("torch_geometric.nn")
    model: nn.Module = getattr(models, name)(
        in_channels=8, hidden_channels=16, num_layers=2, out_channels=8, **options
    )
    return model


def _pooled(name: str) -> nn.Module:
    return Pooled(_basic(name, {}))


def _link() -> nn.Module:
    return LinkScore(_basic("GCN", {}))


def _stack(name: str, options: dict[str, Any]) -> nn.Module:
    conv = getattr(importlib.import_module("torch_geometric.nn"), name)
    return Stack([conv(8, 8, **options) for _ in range(2)])


def _gine() -> nn.Module:
    conv = importlib.import_module("torch_geometric.nn").GINEConv
    return Stack([conv(nn.Linear(8, 8), edge_dim=4) for _ in range(2)])


def cases() -> list[Case]:
    importlib.import_module("torch_geometric.nn")
    makers: dict[str, tuple[Callable[[], nn.Module], Callable[..., Example]]] = {
        name: (partial(_basic, name, options), plain) for name, options in MODELS.items()
    }
    makers["GIN-pooled"] = (partial(_pooled, "GIN"), batched)
    makers["GCN-links"] = (_link, plain)
    makers["GINEConv"] = (_gine, attributed)
    makers["RGCNConv"] = (partial(_stack, "RGCNConv", {"num_relations": 3}), typed)
    transformer = partial(_stack, "TransformerConv", {"edge_dim": 4})
    makers["TransformerConv"] = (transformer, attributed)
    return [
        Case(name=f"geometric/{name}", build=build, call=call, observed=OBSERVED, fresh=FRESH)
        for name, (build, call) in makers.items()
    ]
