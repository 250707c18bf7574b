"""Models written for this benchmark after what people do in ``forward``, and Lightning's demos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from onnxport import Example
from zoo.base import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["cases"]

WIDTH = 6
BATCH = ({"batch": 4},), ({"batch": 1}, {"batch": 3}, {"batch": 9})
LONGER = 8
"""Length at which some models do something else."""
SEQUENCE = (
    ({"batch": 4, "sequence": 7}, {"batch": 4, "sequence": 10}),
    ({"batch": 1, "sequence": 5}, {"batch": 3, "sequence": 12}, {"batch": 9, "sequence": 5}),
)

Sizes = tuple[tuple["Mapping[str, int]", ...], tuple["Mapping[str, int]", ...]]
Entry = tuple["Callable[[], nn.Module]", "Callable[..., Any]", Sizes]


def _sizes(dim: str, observed: tuple[int, ...], fresh: tuple[int, int, int]) -> Sizes:
    batches = (1, 3, 9)
    return (
        tuple({"batch": 4, dim: size} for size in observed),
        tuple({"batch": b, dim: s} for b, s in zip(batches, fresh, strict=True)),
    )


def rows(batch: int) -> Tensor:
    return torch.randn(batch, WIDTH)


def series(batch: int, sequence: int) -> Tensor:
    return torch.randn(batch, sequence, WIDTH)


def image(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


def lengths_of(batch: int, sequence: int) -> Tensor:
    found = torch.randint(1, sequence + 1, (batch,))
    found[0] = sequence
    return found


# Control flow.


class DataBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.left(x)
        return self.right(x)


class WhileLarge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        while bool(y.abs().max() > 0.5):  # noqa: PLR2004
            y = y * 0.5
        return y


class TimeLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        states = []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            states.append(state)
        return torch.stack(states, dim=1)


class BatchBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = self.norm(x) - x.mean(0, keepdim=True)
        return self.head(x)


class LengthBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2))
        if y.shape[-1] > LONGER:
            y = F.avg_pool1d(y, 2)
        return y.mean(-1)


class GreedyDecode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(12, 8), nn.GRUCell(8, WIDTH)
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        token = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        tokens = []
        for _ in range(4):
            x = self.cell(self.embed(token), x)
            token = self.head(x).argmax(-1)
            tokens.append(token)
        return torch.stack(tokens, 1)


class HardRouting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = x.new_zeros(x.shape[0], 5)
        for number, expert in enumerate(self.experts):
            where = (chosen == number).nonzero().squeeze(1)
            out[where] = expert(x[where])
        return out


# Structure of inputs and outputs.


class DictModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = nn.Linear(WIDTH, 8), nn.Embedding(10, 8)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.body(batch["features"]) + self.table(batch["category"])
        return {"logits": hidden, "probability": hidden.softmax(-1), "label": hidden.argmax(-1)}


@dataclass
class Signal:
    values: Tensor
    gain: Tensor
    rate: int = 8000


@dataclass
class Prediction:
    mean: Tensor
    scale: Tensor


class DataclassModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, signal: Signal) -> Prediction:
        mean, scale = self.head(signal.values * signal.gain / (signal.rate / 8000)).chunk(2, -1)
        return Prediction(mean, F.softplus(scale))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class NamedTupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, pair: Pair) -> Pair:
        return Pair(self.head(pair.left), self.head(pair.right) - pair.left.mean(-1, keepdim=True))


class KeywordModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, **batch: Any) -> Tensor:
        return self.head(batch["x"]) * batch["weight"][:, None]


class OptionalModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        y = self.head(x)
        if mask is not None:
            y = y * mask
        if bias is not None:
            y = y + bias
        return y, None


class FlagModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, normalise: bool, steps: int, mode: str = "mean") -> Tensor:
        for _ in range(steps):
            x = torch.tanh(self.head(x))
        if normalise:
            x = F.normalize(x, dim=-1)
        return x.mean(-1) if mode == "mean" else x


class FeatureMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x).relu()
            found.append({"map": x, "pooled": x.mean((2, 3))})
        return found


# Axes.


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 8)

    def forward(self, query: Tensor, support: Tensor, labels: Tensor) -> Tensor:
        distance = torch.cdist(self.body(query), self.body(support))
        return (-distance).softmax(-1) @ F.one_hot(labels, 3).float()


class Similarity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.body(x), dim=-1)
        return z @ z.T


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 24), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weight = torch.einsum("bhid,bhjd->bhij", q, k) / 2
        weight = weight.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf")).softmax(-1)
        return self.out((weight @ v).transpose(1, 2).reshape(b, s, -1))


class PositionCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.zeros(0, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] < x.shape[1]:
            steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            self.table = torch.sin(steps / 10 ** torch.arange(WIDTH, dtype=x.dtype))
        return self.body(x + self.table[: x.shape[1]])


# Sequences with lengths.


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, (hidden, _) = self.rnn(packed)
        return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0], hidden[-1]


class MaskedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.body = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.size(1), device=x.device)[None] < lengths[:, None]
        weight = self.score(x).squeeze(-1).masked_fill(~mask, float("-inf")).softmax(-1)
        return (self.body(x) * weight[..., None]).sum(1)


class RaggedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 8)

    def forward(self, points: Tensor, owner: Tensor, groups: Tensor) -> Tensor:
        total = torch.zeros(groups.shape[0], 8).index_add(0, owner, self.body(points))
        count = torch.zeros(groups.shape[0]).index_add(0, owner, torch.ones(points.shape[0]))
        return total / count.clamp(min=1)[:, None] + groups


class ScatterGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(WIDTH, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        index = target[:, None].expand(-1, nodes.size(1))
        return torch.zeros_like(nodes).scatter_add(0, index, self.message(nodes[source]))


# Weights and numbers.


class FourierMix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=-1) * torch.view_as_complex(self.weight)
        return torch.fft.irfft(spectrum, n=WIDTH, dim=-1)


class ComplexRotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", 1.0 / 100 ** torch.arange(0, WIDTH, 2).div(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), self.rate)
        turn = torch.polar(torch.ones_like(angle), angle)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class Binarised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_Sign.apply(self.first(x)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x).clone()
        y[:, 0] = 0
        y[..., ::2] *= 2
        y[y > 1] = 1
        y.add_(x)
        return y


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.tensor(0))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x - self.mean)
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return y


class TopPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, index = self.score(x).squeeze(-1).topk(3, dim=1)
        kept = torch.take_along_dim(x, index[..., None], dim=1)
        return (self.head(kept) * best.sigmoid()[..., None]).mean(1), index


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[..., 0].argsort(dim=1, descending=True)
        ordered = x.gather(1, order[..., None].expand_as(x))
        return self.head(ordered.cumsum(1))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, WIDTH, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.vmap(lambda weight: x @ weight)(self.weight)
        return every.mean(0), every.std(0)


# Images.


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(8, 4, 2, 2), nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x).relu()
        two = self.down2(one).relu()
        return self.up2(torch.cat([self.up1(two), one], 1)) + x


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = F.interpolate(self.two(one), size=one.shape[-2:], mode="nearest")
        return F.interpolate(one + two, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        parts = x.view(b, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
        mixed = self.mix(parts.reshape(b, c, h // 8, w // 8, 64))
        back = mixed.view(b, c, h // 8, w // 8, 8, 8).permute(0, 1, 2, 4, 3, 5)
        return back.reshape(b, c, h, w)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH * 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(x.shape[0], x.shape[1] // 2, -1))


# Calls.


def _categories(batch: int) -> Any:
    return ({"features": rows(batch), "category": torch.randint(10, (batch,))},)


def _signal(batch: int) -> Any:
    return Example((Signal(rows(batch), torch.rand(batch, 1)),))


def _pair(batch: int) -> Any:
    return Example((Pair(rows(batch), rows(batch)),))


def _weighted(batch: int) -> Any:
    return Example((), {"x": rows(batch), "weight": torch.rand(batch)})


def _masked(batch: int) -> Any:
    return Example((rows(batch), None), {"bias": torch.randn(batch, 3)})


def _flags(batch: int) -> Any:
    return Example((rows(batch), True, 2), {"mode": "all"})


def _time_first(batch: int, sequence: int) -> Any:
    return torch.randn(sequence, batch, WIDTH)


def _support(batch: int, support: int) -> Any:
    return rows(batch), rows(support), torch.randint(3, (support,))


def _square(batch: int) -> Any:
    return torch.randn(batch, 4, 4), torch.randn(4, 4)


def _with_lengths(batch: int, sequence: int) -> Any:
    return series(batch, sequence), lengths_of(batch, sequence)


def _ragged(batch: int, points: int) -> Any:
    return rows(points), torch.randint(batch, (points,)), torch.randn(batch, 8)


def _graph(nodes: int, edges: int) -> Any:
    return rows(nodes), torch.randint(nodes, (2, edges))


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        return self.head(x @ rotation).transpose(1, 2)


def _normed(norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.GELU(), nn.Linear(WIDTH, 3))


def _weight_norm() -> nn.Module:
    conv = parametrizations.weight_norm(nn.Conv1d(WIDTH, 8, 3, padding=1))
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())


def _channels(batch: int, sequence: int) -> Any:
    return torch.randn(batch, WIDTH, sequence)


def _table_of_cases() -> dict[str, Entry]:
    fours = _sizes("size", (16, 24), (20, 32, 12))
    eights = _sizes("size", (16, 24), (32, 40, 8))
    twos = _sizes("sequence", (8, 12), (6, 14, 10))
    graph: Sizes = (
        ({"nodes": 7, "edges": 12}, {"nodes": 8, "edges": 15}),
        ({"nodes": 5, "edges": 9}, {"nodes": 11, "edges": 20}, {"nodes": 3, "edges": 9}),
    )
    one: Sizes = (({"batch": 1},), ({"batch": 2}, {"batch": 3}, {"batch": 9}))
    return {
        "data_branch": (DataBranch, rows, BATCH),
        "while_large": (WhileLarge, rows, BATCH),
        "time_loop": (TimeLoop, series, SEQUENCE),
        "batch_branch": (BatchBranch, rows, BATCH),
        "length_branch": (LengthBranch, series, SEQUENCE),
        "greedy_decode": (GreedyDecode, rows, BATCH),
        "hard_routing": (HardRouting, rows, BATCH),
        "dict": (DictModel, _categories, BATCH),
        "dataclass": (DataclassModel, _signal, BATCH),
        "named_tuple": (NamedTupleModel, _pair, BATCH),
        "keywords": (KeywordModel, _weighted, BATCH),
        "optional": (OptionalModel, _masked, BATCH),
        "flags": (FlagModel, _flags, BATCH),
        "feature_maps": (FeatureMaps, image, _sizes("size", (16, 24), (20, 32, 12))),
        "time_first": (TimeFirst, _time_first, SEQUENCE),
        "prototypes": (Prototypes, _support, _sizes("support", (6, 10), (5, 12, 8))),
        "similarity": (Similarity, rows, BATCH),
        "batch_equals_width": (Square, _square, BATCH),
        "batch_of_one": (DictModel, _categories, one),
        "heads": (Heads, series, SEQUENCE),
        "position_cache": (PositionCache, series, SEQUENCE),
        "packed": (Packed, _with_lengths, SEQUENCE),
        "masked_mean": (MaskedMean, _with_lengths, SEQUENCE),
        "ragged_mean": (RaggedMean, _ragged, _sizes("points", (11, 14), (7, 20, 12))),
        "scatter_graph": (ScatterGraph, _graph, graph),
        "weight_norm": (_weight_norm, _channels, SEQUENCE),
        "spectral_norm": (_normed(parametrizations.spectral_norm), rows, BATCH),
        "orthogonal": (_normed(parametrizations.orthogonal), rows, BATCH),
        "fourier_mix": (FourierMix, rows, BATCH),
        "complex_rotary": (ComplexRotary, series, SEQUENCE),
        "binarised": (Binarised, rows, BATCH),
        "in_place": (InPlace, rows, BATCH),
        "running_mean": (RunningMean, rows, BATCH),
        "top_pool": (TopPool, series, SEQUENCE),
        "sorted": (Sorted, series, SEQUENCE),
        "ensemble": (Ensemble, rows, BATCH),
        "unet": (UNet, image, fours),
        "pyramid": (Pyramid, image, _sizes("size", (16, 24), (19, 32, 13))),
        "windows": (Windows, image, eights),
        "halves": (Halves, series, twos),
    }


def cases() -> list[Case]:
    ours = [
        Case(
            name=f"handmade/{name}",
            build=build,
            call=_example(call),
            observed=sizes[0],
            fresh=sizes[1],
            ours=True,
        )
        for name, (build, call, sizes) in _table_of_cases().items()
    ]
    return ours + _demos()


def _example(call: Callable[..., Any]) -> Callable[..., Example]:
    def example(**sizes: int) -> Example:
        return Example.of(call(**sizes))

    return example


def _demos() -> list[Case]:
    """The models that Lightning ships."""
    from lightning.pytorch.demos import Transformer
    from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel
    from lightning.pytorch.demos.lstm import SimpleLSTM

    def transformer() -> nn.Module:
        return Transformer(vocab_size=50, ninp=16, nhid=16)

    def lstm() -> nn.Module:
        return SimpleLSTM(vocab_size=50, ninp=16, nhid=16, nlayers=2)

    def pair(batch: int, sequence: int) -> Example:
        return Example(tuple(torch.randint(50, (batch, sequence)) for _ in range(2)))

    def tokens(batch: int, sequence: int) -> Example:
        state = torch.randn(2, batch, 16), torch.randn(2, batch, 16)
        return Example((torch.randint(50, (batch, sequence)), state))

    def wide(batch: int) -> Example:
        return Example((torch.randn(batch, 32),))

    table: dict[str, Entry] = {
        "demo_transformer": (transformer, pair, SEQUENCE),
        "demo_lstm": (lstm, tokens, SEQUENCE),
        "boring_model": (BoringModel, wide, BATCH),
        "demo_model": (DemoModel, wide, BATCH),
    }
    return [
        Case(name=f"lightning/{name}", build=build, call=call, observed=seen, fresh=fresh)
        for name, (build, call, (seen, fresh)) in table.items()
    ]
