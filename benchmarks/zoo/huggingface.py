"""Architectures of ``transformers``, from tiny configurations with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers as tf

from onnxport import Example
from zoo.base import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

__all__ = ["cases"]

VOCABULARY = 64
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = WIDTH | {"vocab_size": VOCABULARY, "intermediate_size": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | SPECIAL | {"num_key_value_heads": 1}
SEQUENCE = ({"batch": 4, "sequence": 7}, {"batch": 4, "sequence": 10})
SEQUENCES = (
    {"batch": 1, "sequence": 5},
    {"batch": 3, "sequence": 12},
    {"batch": 9, "sequence": 5},
)
BATCH = ({"batch": 4},)
BATCHES = ({"batch": 1}, {"batch": 3}, {"batch": 9})
PAIR = (
    {"batch": 4, "sequence": 7, "target": 6},
    {"batch": 4, "sequence": 10, "target": 9},
)
PAIRS = (
    {"batch": 1, "sequence": 5, "target": 3},
    {"batch": 3, "sequence": 12, "target": 8},
    {"batch": 9, "sequence": 5, "target": 8},
)
AUDIO = ({"batch": 4, "samples": 1000}, {"batch": 4, "samples": 1400})
AUDIOS = (
    {"batch": 1, "samples": 800},
    {"batch": 3, "samples": 1700},
    {"batch": 9, "samples": 800},
)


INEXPRESSIBLE = {
    # It samples the keys that choose which queries attend; by a millionth while untrained.
    "informer": "draws samples inside forward: the values of two calls differ",
}


def cases() -> list[Case]:
    return [
        *_encoders(),
        *_decoders(),
        *_encoder_decoders(),
        *_vision(),
        *_audio(),
        *_multimodal(),
        *_time_series(),
    ]


def _case(
    name: str,
    model: str,
    config: Callable[[], Any],
    call: Callable[..., Example],
    sizes: tuple[tuple[Mapping[str, int], ...], tuple[Mapping[str, int], ...]],
) -> Case:
    def build() -> nn.Module:
        return getattr(tf, model)(config())

    observed, fresh = sizes
    return Case(
        name=f"huggingface/{name}",
        build=build,
        call=call,
        observed=observed,
        fresh=fresh,
        inexpressible=INEXPRESSIBLE.get(name, ""),
    )


def _ids(batch: int, sequence: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, sequence))


def _mask(batch: int, sequence: int) -> torch.Tensor:
    lengths = torch.randint(2, sequence + 1, (batch, 1))
    return (torch.arange(sequence)[None] < lengths).long()


def text(batch: int, sequence: int) -> Example:
    given = {"input_ids": _ids(batch, sequence), "attention_mask": _mask(batch, sequence)}
    return Example((), given)


def text_alone(batch: int, sequence: int) -> Example:
    return Example((), {"input_ids": _ids(batch, sequence)})


def text_cached(batch: int, sequence: int) -> Example:
    full = torch.ones(batch, sequence, dtype=torch.long)
    given = {"input_ids": _ids(batch, sequence), "attention_mask": full, "use_cache": True}
    return Example((), given)


def text_uncached(batch: int, sequence: int) -> Example:
    full = torch.ones(batch, sequence, dtype=torch.long)
    given = {"input_ids": _ids(batch, sequence), "attention_mask": full, "use_cache": False}
    return Example((), given)


def typed(batch: int, sequence: int) -> Example:
    kinds = torch.randint(2, (batch, sequence))
    return Example((), dict(text(batch, sequence).kwargs) | {"token_type_ids": kinds})


def layout(batch: int, sequence: int) -> Example:
    corner = torch.randint(0, 500, (batch, sequence, 2))
    boxes = torch.cat([corner, corner + torch.randint(1, 400, (batch, sequence, 2))], -1)
    return Example((), dict(text(batch, sequence).kwargs) | {"bbox": boxes})


def both(batch: int, sequence: int, target: int) -> Example:
    given = dict(text(batch, sequence).kwargs) | {"decoder_input_ids": _ids(batch, target)}
    return Example((), given)


def both_uncached(batch: int, sequence: int, target: int) -> Example:
    return Example((), dict(both(batch, sequence, target).kwargs) | {"use_cache": False})


def pixels(size: int, channels: int = 3) -> Callable[..., Example]:
    def call(batch: int) -> Example:
        return Example((), {"pixel_values": torch.randn(batch, channels, size, size)})

    return call


def waves(batch: int, samples: int) -> Example:
    return Example((), {"input_values": torch.randn(batch, samples)})


Row = tuple[str, str, "Callable[[], Any]", "Callable[..., Example]"]


def _encoders() -> list[Case]:
    distil = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    flat = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
    rows: list[Row] = [
        ("bert", "BertForSequenceClassification", lambda: tf.BertConfig(**TEXT), typed),
        ("bert_tokens", "BertForTokenClassification", lambda: tf.BertConfig(**TEXT), text),
        ("bert_question", "BertForQuestionAnswering", lambda: tf.BertConfig(**TEXT), text),
        ("roberta", "RobertaForMaskedLM", lambda: tf.RobertaConfig(**TEXT), text),
        ("xlm_roberta", "XLMRobertaModel", lambda: tf.XLMRobertaConfig(**TEXT), text),
        ("camembert", "CamembertModel", lambda: tf.CamembertConfig(**TEXT), text),
        (
            "distilbert",
            "DistilBertForSequenceClassification",
            lambda: tf.DistilBertConfig(**distil),
            text,
        ),
        (
            "albert",
            "AlbertForSequenceClassification",
            lambda: tf.AlbertConfig(**TEXT, embedding_size=8),
            text,
        ),
        ("electra", "ElectraModel", lambda: tf.ElectraConfig(**TEXT, embedding_size=8), text),
        ("deberta", "DebertaModel", lambda: tf.DebertaConfig(**TEXT), text),
        (
            "deberta_v2",
            "DebertaV2ForSequenceClassification",
            lambda: tf.DebertaV2Config(**TEXT, relative_attention=True, position_buckets=8),
            text,
        ),
        ("mpnet", "MPNetModel", lambda: tf.MPNetConfig(**TEXT), text),
        ("convbert", "ConvBertModel", lambda: tf.ConvBertConfig(**TEXT, embedding_size=8), text),
        ("squeezebert", "SqueezeBertModel", _squeezebert, text),
        ("funnel", "FunnelModel", _funnel, text),
        (
            "fnet",
            "FNetModel",
            lambda: tf.FNetConfig(**flat, num_hidden_layers=2),
            text_alone,
        ),
        ("modernbert", "ModernBertModel", lambda: tf.ModernBertConfig(**TEXT, **SPECIAL), text),
        ("layoutlm", "LayoutLMModel", lambda: tf.LayoutLMConfig(**TEXT), layout),
        ("roformer", "RoFormerModel", lambda: tf.RoFormerConfig(**TEXT), text),
        ("xlnet", "XLNetModel", _xlnet, text),
    ]
    return [_case(*row, (SEQUENCE, SEQUENCES)) for row in rows]


def _squeezebert() -> Any:
    groups = {f"{part}_groups": 2 for part in ("q", "k", "v", "post_attention", "intermediate")}
    return tf.SqueezeBertConfig(**TEXT, embedding_size=16, output_groups=2, **groups)


def _funnel() -> Any:
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": VOCABULARY}
    return tf.FunnelConfig(**sizes, block_sizes=[1, 1], num_decoder_layers=1)


def _xlnet() -> Any:
    return tf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32)


def _decoders() -> list[Case]:
    gpt = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2} | SPECIAL
    rows: list[Row] = [
        ("gpt2", "GPT2LMHeadModel", lambda: tf.GPT2Config(**gpt), text_uncached),
        ("gpt2_cache", "GPT2LMHeadModel", lambda: tf.GPT2Config(**gpt), text_cached),
        ("gpt_neo", "GPTNeoForCausalLM", _gpt_neo, text_uncached),
        ("gptj", "GPTJForCausalLM", lambda: tf.GPTJConfig(**gpt, rotary_dim=4), text_uncached),
        (
            "gpt_neox",
            "GPTNeoXForCausalLM",
            lambda: tf.GPTNeoXConfig(**TEXT, **SPECIAL),
            text_uncached,
        ),
        ("opt", "OPTForCausalLM", _opt, text_uncached),
        ("bloom", "BloomForCausalLM", _bloom, text_uncached),
        ("llama", "LlamaForCausalLM", lambda: tf.LlamaConfig(**GROUPED), text_uncached),
        ("llama_cache", "LlamaForCausalLM", lambda: tf.LlamaConfig(**GROUPED), text_cached),
        (
            "llama_classifier",
            "LlamaForSequenceClassification",
            lambda: tf.LlamaConfig(**GROUPED),
            text_uncached,
        ),
        (
            "mistral",
            "MistralForCausalLM",
            lambda: tf.MistralConfig(**GROUPED, sliding_window=6),
            text_uncached,
        ),
        ("mixtral", "MixtralForCausalLM", _mixtral, text_uncached),
        ("qwen2", "Qwen2ForCausalLM", lambda: tf.Qwen2Config(**GROUPED), text_uncached),
        ("gemma", "GemmaForCausalLM", lambda: tf.GemmaConfig(**GROUPED, head_dim=8), text_cached),
        ("phi", "PhiForCausalLM", lambda: tf.PhiConfig(**TEXT, **SPECIAL), text_uncached),
        ("falcon", "FalconForCausalLM", lambda: tf.FalconConfig(**TEXT, **SPECIAL), text_uncached),
        ("mamba", "MambaForCausalLM", _mamba, text_alone),
    ]
    return [_case(*row, (SEQUENCE, SEQUENCES)) for row in rows]


def _gpt_neo() -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    kinds = [[["global", "local"], 1]]
    return tf.GPTNeoConfig(**sizes, **SPECIAL, attention_types=kinds, window_size=4)


def _opt() -> Any:
    return tf.OPTConfig(
        **WIDTH, **SPECIAL, vocab_size=VOCABULARY, ffn_dim=32, word_embed_proj_dim=16
    )


def _bloom() -> Any:
    return tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, **SPECIAL)


def _mixtral() -> Any:
    return tf.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2)


def _mamba() -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return tf.MambaConfig(**sizes, **SPECIAL, use_cache=False)


def _encoder_decoders() -> list[Case]:
    layers = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    bart = {"vocab_size": VOCABULARY, "d_model": 16, "decoder_start_token_id": 1} | layers | SPECIAL
    t5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    start = {"num_heads": 2, "decoder_start_token_id": 0}
    rows: list[Row] = [
        ("t5", "T5ForConditionalGeneration", lambda: tf.T5Config(**t5, **start), both_uncached),
        ("t5_cache", "T5ForConditionalGeneration", lambda: tf.T5Config(**t5, **start), both),
        ("bart", "BartForConditionalGeneration", lambda: tf.BartConfig(**bart), both_uncached),
        ("marian", "MarianMTModel", lambda: tf.MarianConfig(**bart), both_uncached),
        ("pegasus", "PegasusModel", lambda: tf.PegasusConfig(**bart), both_uncached),
        ("m2m_100", "M2M100Model", lambda: tf.M2M100Config(**bart), both_uncached),
    ]
    return [_case(*row, (PAIR, PAIRS)) for row in rows]


def _vision() -> list[Case]:
    patch = WIDTH | {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    stages = {"depths": [1, 1], "hidden_sizes": [8, 16]}
    rows: list[Row] = [
        ("vit", "ViTForImageClassification", lambda: tf.ViTConfig(**patch), pixels(16)),
        ("deit", "DeiTForImageClassification", lambda: tf.DeiTConfig(**patch), pixels(16)),
        ("beit", "BeitForImageClassification", lambda: tf.BeitConfig(**patch), pixels(16)),
        (
            "dinov2",
            "Dinov2Model",
            lambda: tf.Dinov2Config(**WIDTH, image_size=16, patch_size=4),
            pixels(16),
        ),
        ("swin", "SwinForImageClassification", _swin, pixels(32)),
        (
            "convnext",
            "ConvNextForImageClassification",
            lambda: tf.ConvNextConfig(**stages, num_stages=2),
            pixels(32),
        ),
        (
            "resnet",
            "ResNetForImageClassification",
            lambda: tf.ResNetConfig(**stages, embedding_size=8, layer_type="basic"),
            pixels(32),
        ),
        ("mobilenet_v2", "MobileNetV2ForImageClassification", _mobilenet, pixels(32)),
        ("segformer", "SegformerForSemanticSegmentation", _segformer, pixels(32)),
        ("poolformer", "PoolFormerForImageClassification", _poolformer, pixels(32)),
    ]
    return [_case(*row, (BATCH, BATCHES)) for row in rows]


def _dinov2() -> Any:
    return tf.Dinov2Config(**WIDTH, image_size=16, patch_size=4)


def _swin() -> Any:
    shape = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    return tf.SwinConfig(**shape, depths=[1, 1], num_heads=[2, 2])


def _mobilenet() -> Any:
    return tf.MobileNetV2Config(image_size=32, depth_multiplier=0.35)


def _segformer() -> Any:
    return tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )


def _poolformer() -> Any:
    return tf.PoolFormerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_encoder_blocks=4,
    )


CONVOLUTIONS = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "intermediate_size": 32,
    "vocab_size": 16,
}


def _audio() -> list[Case]:
    wave = WIDTH | CONVOLUTIONS
    rows: list[Row] = [
        ("wav2vec2", "Wav2Vec2ForCTC", lambda: tf.Wav2Vec2Config(**wave), waves),
        ("hubert", "HubertModel", lambda: tf.HubertConfig(**wave), waves),
        ("wavlm", "WavLMModel", lambda: tf.WavLMConfig(**wave), waves),
    ]

    def whisper(batch: int) -> Example:
        features = torch.randn(batch, 8, 40)
        given = {"input_features": features, "decoder_input_ids": _ids(batch, 6)}
        return Example((), given | {"use_cache": False})

    def spectrogram(batch: int) -> Example:
        return Example((), {"input_values": torch.randn(batch, 32, 16)})

    return [
        *(_case(*row, (AUDIO, AUDIOS)) for row in rows),
        _case(
            "whisper",
            "WhisperForConditionalGeneration",
            _whisper,
            whisper,
            (BATCH, BATCHES),
        ),
        _case("ast", "ASTForAudioClassification", _ast, spectrogram, (BATCH, BATCHES)),
    ]


def _whisper() -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    lengths = {"max_source_positions": 20, "max_target_positions": 16}
    ids = {"vocab_size": VOCABULARY, "decoder_start_token_id": 1} | SPECIAL
    return tf.WhisperConfig(**layers, **heads, **widths, **lengths, **ids)


def _ast() -> Any:
    shape = {"patch_size": 4, "max_length": 32, "num_mel_bins": 16, "intermediate_size": 32}
    return tf.ASTConfig(**WIDTH, **shape, frequency_stride=4, time_stride=4)


def _multimodal() -> list[Case]:
    def captions(batch: int, sequence: int) -> Example:
        image = torch.randn(batch, 3, 16, 16)
        return Example((), dict(text(batch, sequence).kwargs) | {"pixel_values": image})

    def regions(batch: int, sequence: int) -> Example:
        found = {"visual_feats": torch.randn(batch, 5, 8), "visual_pos": torch.rand(batch, 5, 4)}
        return Example((), dict(text(batch, sequence).kwargs) | found)

    rows: list[Row] = [
        ("clip", "CLIPModel", _clip, captions),
        ("clip_text", "CLIPTextModel", lambda: tf.CLIPTextConfig(**TEXT, **SPECIAL), text),
        ("siglip", "SiglipModel", _siglip, captions),
        ("lxmert", "LxmertModel", _lxmert, regions),
    ]
    return [_case(*row, (SEQUENCE, SEQUENCES)) for row in rows]


def _clip() -> Any:
    patch = WIDTH | {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    return tf.CLIPConfig(text_config=TEXT | SPECIAL, vision_config=patch, projection_dim=8)


def _siglip() -> Any:
    patch = WIDTH | {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    return tf.SiglipConfig(text_config=TEXT | SPECIAL, vision_config=patch)


def _lxmert() -> Any:
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8}
    return tf.LxmertConfig(**TEXT, **layers)


def _time_series() -> list[Case]:
    def past(batch: int) -> Example:
        return Example((), {"past_values": torch.randn(batch, 32, 3)})

    def forecast(batch: int) -> Example:
        given = {
            "past_values": torch.randn(batch, 24),
            "past_time_features": torch.randn(batch, 24, 1),
            "past_observed_mask": torch.ones(batch, 24),
            "future_time_features": torch.randn(batch, 4, 1),
            "future_values": torch.randn(batch, 4),
        }
        return Example((), given)

    shape = {"context_length": 32, "prediction_length": 4}
    patch = shape | {"d_model": 16, "num_input_channels": 3}
    series = {"prediction_length": 4, "context_length": 17, "d_model": 16, "num_time_features": 1}
    widths = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    series |= widths | {"decoder_ffn_dim": 16}
    patchtst = patch | {"patch_length": 8, "patch_stride": 8, "num_attention_heads": 2}
    patchtst |= {"ffn_dim": 32, "num_hidden_layers": 2}
    rows: list[Row] = [
        (
            "patchtst",
            "PatchTSTForPrediction",
            lambda: tf.PatchTSTConfig(**patchtst),
            past,
        ),
        (
            "patchtsmixer",
            "PatchTSMixerForPrediction",
            lambda: tf.PatchTSMixerConfig(**patch, patch_length=8, patch_stride=8, num_layers=2),
            past,
        ),
        (
            "time_series_transformer",
            "TimeSeriesTransformerModel",
            lambda: tf.TimeSeriesTransformerConfig(**series),
            forecast,
        ),
        ("informer", "InformerModel", lambda: tf.InformerConfig(**series), forecast),
        ("autoformer", "AutoformerModel", lambda: tf.AutoformerConfig(**series), forecast),
    ]
    return [_case(*row, (BATCH, BATCHES)) for row in rows]
