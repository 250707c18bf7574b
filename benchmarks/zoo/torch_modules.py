"""Modules of ``torch.nn``: recurrent, attention, normalisation, embedding, pooling and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onnxport import Example
from zoo.base import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["cases"]

BATCH = ({"batch": 4},)
BATCHES = ({"batch": 1}, {"batch": 3}, {"batch": 9})
SEQUENCE = ({"batch": 4, "sequence": 7}, {"batch": 4, "sequence": 10})
SEQUENCES = (
    {"batch": 1, "sequence": 5},
    {"batch": 3, "sequence": 12},
    {"batch": 9, "sequence": 5},
)
IMAGE = ({"batch": 4, "size": 16}, {"batch": 4, "size": 24})
IMAGES = ({"batch": 1, "size": 20}, {"batch": 3, "size": 32}, {"batch": 9, "size": 20})
WIDTH = 6


def cases() -> list[Case]:
    return [*_recurrent(), *_attention(), *_batch_only(), *_images(), *_lines()]


def _case(
    name: str,
    build: Callable[[], nn.Module],
    call: Callable[..., Any],
    observed: tuple[Mapping[str, int], ...],
    fresh: tuple[Mapping[str, int], ...],
) -> Case:
    def example(**sizes: int) -> Example:
        return Example.of(call(**sizes))

    return Case(name=f"torch/{name}", build=build, call=example, observed=observed, fresh=fresh)


def _series(batch: int, sequence: int) -> torch.Tensor:
    return torch.randn(batch, sequence, WIDTH)


def _time_first(batch: int, sequence: int) -> torch.Tensor:
    return torch.randn(sequence, batch, WIDTH)


def _hidden(layers: int) -> Callable[..., Any]:
    def call(batch: int, sequence: int) -> Any:
        return _series(batch, sequence), torch.randn(layers, batch, 8)

    return call


def _hidden_pair(batch: int, sequence: int) -> Any:
    state = torch.randn(2, batch, 8), torch.randn(2, batch, 8)
    return _series(batch, sequence), state


def _recurrent() -> list[Case]:
    first = {"batch_first": True}
    table: list[tuple[str, Callable[[], nn.Module], Callable[..., Any]]] = [
        ("rnn", lambda: nn.RNN(WIDTH, 8, **first), _series),
        ("rnn_time_first", lambda: nn.RNN(WIDTH, 8, nonlinearity="relu"), _time_first),
        ("rnn_hidden", lambda: nn.RNN(WIDTH, 8, **first), _hidden(1)),
        ("lstm", lambda: nn.LSTM(WIDTH, 8, **first), _series),
        ("lstm_time_first", lambda: nn.LSTM(WIDTH, 8), _time_first),
        ("lstm_hidden", lambda: nn.LSTM(WIDTH, 8, 2, **first), _hidden_pair),
        ("lstm_bidirectional", lambda: nn.LSTM(WIDTH, 8, 2, bidirectional=True, **first), _series),
        ("lstm_projected", lambda: nn.LSTM(WIDTH, 8, proj_size=5, **first), _series),
        ("gru", lambda: nn.GRU(WIDTH, 8, **first), _series),
        ("gru_hidden", lambda: nn.GRU(WIDTH, 8, 2, **first), _hidden(2)),
        ("gru_bidirectional", lambda: nn.GRU(WIDTH, 8, bidirectional=True, **first), _series),
    ]
    found = [_case(name, build, call, SEQUENCE, SEQUENCES) for name, build, call in table]

    def cell(batch: int) -> Any:
        return torch.randn(batch, WIDTH), torch.randn(batch, 8)

    def cell_pair(batch: int) -> Any:
        return torch.randn(batch, WIDTH), (torch.randn(batch, 8), torch.randn(batch, 8))

    return [
        *found,
        _case("rnn_cell", lambda: nn.RNNCell(WIDTH, 8), cell, BATCH, BATCHES),
        _case("gru_cell", lambda: nn.GRUCell(WIDTH, 8), cell, BATCH, BATCHES),
        _case("lstm_cell", lambda: nn.LSTMCell(WIDTH, 8), cell_pair, BATCH, BATCHES),
    ]


def _width8(batch: int, sequence: int) -> torch.Tensor:
    return torch.randn(batch, sequence, 8)


def _padding(batch: int, sequence: int) -> torch.Tensor:
    lengths = torch.randint(1, sequence + 1, (batch, 1))
    return torch.arange(sequence)[None] >= lengths


def _causal(sequence: int) -> torch.Tensor:
    return torch.full((sequence, sequence), float("-inf")).triu(1)


def _attention() -> list[Case]:  # noqa: C901 - a flat list of calls
    def attend(batch: int, sequence: int) -> Example:
        x = _width8(batch, sequence)
        return Example((x, x, x))

    def attend_padded(batch: int, sequence: int) -> Example:
        x = _width8(batch, sequence)
        return Example((x, x, x), {"key_padding_mask": _padding(batch, sequence)})

    def attend_causal(batch: int, sequence: int) -> Example:
        x = _width8(batch, sequence)
        return Example((x, x, x), {"attn_mask": _causal(sequence), "need_weights": False})

    def cross(batch: int, sequence: int) -> Example:
        memory = torch.randn(batch, 5, 8)
        return Example((_width8(batch, sequence), memory, memory))

    def padded(batch: int, sequence: int) -> Example:
        mask = {"src_key_padding_mask": _padding(batch, sequence)}
        return Example((_width8(batch, sequence),), mask)

    def causal(batch: int, sequence: int) -> Example:
        mask = {"mask": _causal(sequence), "is_causal": True}
        return Example((_width8(batch, sequence),), mask)

    def decode(batch: int, sequence: int) -> Example:
        mask = {"tgt_mask": _causal(sequence), "tgt_is_causal": True}
        return Example((_width8(batch, sequence), torch.randn(batch, 5, 8)), mask)

    def pair(batch: int, sequence: int) -> Example:
        return Example((_width8(batch, sequence), torch.randn(batch, 5, 8)))

    def attention(**options: Any) -> Callable[[], nn.Module]:
        return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def encoder() -> nn.Module:
        return nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)

    def encoder_nested() -> nn.Module:
        return nn.TransformerEncoder(layer(), 2)

    def decoder() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)

    def transformer() -> nn.Module:
        return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def time_first(batch: int, sequence: int) -> torch.Tensor:
        return torch.randn(sequence, batch, 8)

    table: list[tuple[str, Callable[[], nn.Module], Callable[..., Any]]] = [
        ("multihead_attention", attention(), attend),
        ("multihead_attention_padding", attention(), attend_padded),
        ("multihead_attention_causal", attention(), attend_causal),
        ("multihead_attention_cross", attention(add_bias_kv=True), cross),
        ("transformer_encoder_layer", layer, _width8),
        ("transformer_encoder_time_first", lambda: nn.TransformerEncoderLayer(8, 2), time_first),
        ("transformer_encoder", encoder, causal),
        ("transformer_encoder_padding", encoder_nested, padded),
        ("transformer_decoder", decoder, decode),
        ("transformer", transformer, pair),
    ]
    return [_case(name, build, call, SEQUENCE, SEQUENCES) for name, build, call in table]


def _batch_only() -> list[Case]:
    def bag(batch: int) -> Any:
        return torch.randint(20, (batch, 5))

    def bag_weighted(batch: int) -> Any:
        ids = torch.randint(20, (batch, 5))
        return Example((ids,), {"per_sample_weights": torch.rand(batch, 5)})

    def bag_offsets(batch: int) -> Any:
        return torch.randint(20, (3 * batch,)), torch.arange(0, 3 * batch, 3)

    def two(batch: int) -> Any:
        return torch.randn(batch, WIDTH), torch.randn(batch, WIDTH)

    def rows(batch: int) -> Any:
        return torch.randn(batch, WIDTH)

    table: list[tuple[str, Callable[[], nn.Module], Callable[..., Any]]] = [
        ("embedding_bag", lambda: nn.EmbeddingBag(20, 8, mode="mean"), bag),
        ("embedding_bag_weighted", lambda: nn.EmbeddingBag(20, 8, mode="sum"), bag_weighted),
        ("embedding_bag_offsets", lambda: nn.EmbeddingBag(20, 8, mode="max"), bag_offsets),
        ("bilinear", lambda: nn.Bilinear(WIDTH, WIDTH, 4), two),
        ("cosine_similarity", nn.CosineSimilarity, two),
        ("pairwise_distance", nn.PairwiseDistance, two),
        ("rms_norm", lambda: nn.RMSNorm(WIDTH), rows),
        ("glu", nn.GLU, rows),
        ("adaptive_softmax", _adaptive_softmax, rows),
    ]
    return [_case(name, build, call, BATCH, BATCHES) for name, build, call in table]


def _adaptive_softmax() -> nn.Module:
    class LogProb(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 20, [5, 10])

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.head.log_prob(features)

    return LogProb()


def _images() -> list[Case]:
    def image(batch: int, size: int) -> torch.Tensor:
        return torch.randn(batch, 4, size, size)

    table: list[tuple[str, Callable[[], nn.Module]]] = [
        ("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 3, 3, 2, output_padding=1, padding=1)),
        ("group_norm", lambda: nn.GroupNorm(2, 4)),
        ("instance_norm", lambda: nn.InstanceNorm2d(4, affine=True)),
        ("adaptive_avg_pool2d", lambda: nn.AdaptiveAvgPool2d((3, 5))),
        ("adaptive_max_pool2d", lambda: nn.AdaptiveMaxPool2d(1)),
        ("lp_pool2d", lambda: nn.LPPool2d(2, 3, 2)),
        ("upsample_bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
        ("upsample_bicubic", lambda: nn.Upsample(size=(30, 30), mode="bicubic")),
        ("pixel_shuffle", lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(4))),
        ("unfold", lambda: nn.Unfold(3, padding=1)),
        ("reflection_pad2d", lambda: nn.ReflectionPad2d(2)),
        ("circular_pad2d", lambda: nn.CircularPad2d(1)),
        ("local_response_norm", lambda: nn.LocalResponseNorm(2)),
    ]
    return [_case(name, build, image, IMAGE, IMAGES) for name, build in table]


def _lines() -> list[Case]:
    def line(batch: int, sequence: int) -> torch.Tensor:
        return torch.randn(batch, WIDTH, sequence)

    table: list[tuple[str, Callable[[], nn.Module]]] = [
        ("conv1d_dilated", lambda: nn.Conv1d(WIDTH, 4, 3, padding="same", dilation=2)),
        ("batch_norm1d", lambda: nn.BatchNorm1d(WIDTH)),
        ("max_pool1d_indices", lambda: nn.MaxPool1d(2, return_indices=True)),
    ]
    return [_case(name, build, line, SEQUENCE, SEQUENCES) for name, build in table]
