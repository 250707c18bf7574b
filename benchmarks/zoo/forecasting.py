"""Forecasters: neuralforecast, pytorch-forecasting and GluonTS."""

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

OBSERVED = ({"batch": 4},)
FRESH = ({"batch": 1}, {"batch": 3}, {"batch": 7})
PAST = 24
FUTURE = 6
SERIES = 3
KINDS = 3
"""Values of each categorical feature."""

SAMPLES = "draws samples inside forward: the values of two calls differ"

NEURALFORECAST: dict[str, dict[str, Any]] = {
    "Autoformer": {"hidden_size": 16, "conv_hidden_size": 16, "n_head": 2, "encoder_layers": 1},
    "BiTCN": {"hidden_size": 8},
    "DLinear": {},
    "DilatedRNN": {"encoder_hidden_size": 16, "dilations": [[1, 2]]},
    "GRU": {"encoder_hidden_size": 16, "encoder_n_layers": 1, "decoder_hidden_size": 16},
    "Informer": {"hidden_size": 16, "conv_hidden_size": 16, "n_head": 2, "encoder_layers": 2},
    "KAN": {"hidden_size": 16},
    "LSTM": {"encoder_hidden_size": 16, "encoder_n_layers": 1, "decoder_hidden_size": 16},
    "MLP": {"hidden_size": 32},
    "NBEATS": {"mlp_units": 3 * [[32, 32]]},
    "NHITS": {"mlp_units": 3 * [[32, 32]]},
    "PatchTST": {
        "encoder_layers": 1,
        "n_heads": 2,
        "hidden_size": 16,
        "linear_hidden_size": 16,
        "patch_len": 8,
        "stride": 4,
    },
    "TCN": {"encoder_hidden_size": 16, "dilations": [1, 2, 4], "decoder_hidden_size": 16},
    "TFT": {"hidden_size": 16, "n_head": 2},
    "TiDE": {"hidden_size": 16, "decoder_output_dim": 8, "temporal_decoder_dim": 16},
    "VanillaTransformer": {"hidden_size": 16, "conv_hidden_size": 16, "n_head": 2},
}
"""Models of one series and their options."""

MULTIVARIATE: dict[str, dict[str, Any]] = {
    "SOFTS": {"hidden_size": 16, "d_core": 16, "e_layers": 1, "d_ff": 32},
    "TSMixer": {"n_block": 1, "ff_dim": 16},
    "iTransformer": {"hidden_size": 16, "n_heads": 2, "e_layers": 1, "d_ff": 32},
}
"""Models of several series at once and their options."""

PYTORCH_FORECASTING: dict[str, tuple[bool, dict[str, Any]]] = {
    "DecoderMLP": (True, {"hidden_size": 16, "n_hidden_layers": 1}),
    "DeepAR": (True, {"hidden_size": 8, "rnn_layers": 1}),
    "NBeats": (False, {"widths": [16, 32], "backcast_loss_ratio": 0.1}),
    "NHiTS": (True, {"hidden_size": 16}),
    "RecurrentNetwork": (True, {"hidden_size": 8, "rnn_layers": 1}),
    "TemporalFusionTransformer": (
        True,
        {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 8},
    ),
    "TiDEModel": (True, {"hidden_size": 16, "temporal_decoder_hidden": 8}),
}
"""Models, whether they take covariates, and their options."""

GLUONTS: dict[str, tuple[str, dict[str, Any]]] = {
    "DLinearModel": (
        "d_linear",
        {"prediction_length": FUTURE, "context_length": PAST, "hidden_dimension": 8},
    ),
    "DeepARModel": (
        "deepar",
        {
            "freq": "D",
            "context_length": PAST,
            "prediction_length": FUTURE,
            "num_layers": 1,
            "hidden_size": 8,
            "cardinality": [KINDS],
            "lags_seq": [1, 2, 7],
            "num_parallel_samples": 5,
        },
    ),
    "ITransformerModel": (
        "i_transformer",
        {
            "prediction_length": FUTURE,
            "context_length": PAST,
            "d_model": 16,
            "nhead": 2,
            "dim_feedforward": 32,
            "dropout": 0.1,
            "activation": "relu",
            "norm_first": False,
            "num_encoder_layers": 1,
            "scaling": "mean",
        },
    ),
    "LagTSTModel": (
        "lag_tst",
        {
            "prediction_length": FUTURE,
            "context_length": PAST,
            "freq": "D",
            "d_model": 16,
            "nhead": 2,
            "dim_feedforward": 32,
            "dropout": 0.1,
            "activation": "relu",
            "norm_first": False,
            "num_encoder_layers": 1,
            "scaling": "mean",
            "lags_seq": [1, 2, 7],
        },
    ),
    "PatchTSTModel": (
        "patch_tst",
        {
            "prediction_length": FUTURE,
            "context_length": PAST,
            "patch_len": 8,
            "stride": 4,
            "padding_patch": "end",
            "d_model": 16,
            "nhead": 2,
            "dim_feedforward": 32,
            "num_feat_dynamic_real": 2,
            "dropout": 0.1,
            "activation": "relu",
            "norm_first": False,
            "num_encoder_layers": 1,
            "scaling": "mean",
        },
    ),
    "SimpleFeedForwardModel": (
        "simple_feedforward",
        {"prediction_length": FUTURE, "context_length": PAST, "hidden_dimensions": [16, 16]},
    ),
    "TemporalFusionTransformerModel": (
        "tft",
        {
            "context_length": PAST,
            "prediction_length": FUTURE,
            "d_hidden": 8,
            "d_var": 8,
            "num_heads": 2,
            "c_feat_static_cat": [KINDS],
        },
    ),
    "TiDEModel": (
        "tide",
        {
            "context_length": PAST,
            "prediction_length": FUTURE,
            "num_feat_dynamic_real": 2,
            "num_feat_dynamic_proj": 2,
            "num_feat_static_real": 1,
            "num_feat_static_cat": 1,
            "cardinality": [KINDS],
            "embedding_dimension": [4],
            "feat_proj_hidden_dim": 8,
            "encoder_hidden_dim": 16,
            "decoder_hidden_dim": 16,
            "temporal_hidden_dim": 8,
            "distr_hidden_dim": 8,
            "num_layers_encoder": 1,
            "num_layers_decoder": 1,
            "decoder_output_dim": 8,
            "dropout_rate": 0.1,
            "layer_norm": True,
            "scaling": "mean",
        },
    ),
}
"""Class, its package, options."""


def windows(*, batch: int, series: int = 1) -> Example:
    """Return the dict that neuralforecast's training step makes."""
    return Example(
        (
            {
                "insample_y": torch.randn(batch, PAST, series),
                "insample_mask": torch.ones(batch, PAST, series),
                "futr_exog": None,
                "hist_exog": None,
                "stat_exog": None,
            },
        )
    )


def frames(*, batch: int, covariates: bool) -> Example:
    """Return the dict that pytorch-forecasting's data loader makes."""
    cats, reals = (1, 2) if covariates else (0, 1)
    kinds = torch.randint(0, KINDS, (batch, 1, cats))
    past = torch.randn(batch, PAST, reals)
    future = torch.randn(batch, FUTURE, reals)
    return Example(
        (
            {
                "encoder_cat": kinds.expand(batch, PAST, cats).clone(),
                "encoder_cont": past,
                "encoder_target": past[..., -1].clone(),
                "encoder_lengths": torch.full((batch,), PAST),
                "decoder_cat": kinds.expand(batch, FUTURE, cats).clone(),
                "decoder_cont": future,
                "decoder_target": future[..., -1].clone(),
                "decoder_lengths": torch.full((batch,), FUTURE),
                "decoder_time_idx": (PAST + torch.arange(FUTURE)).repeat(batch, 1),
                "groups": torch.randint(0, KINDS, (batch, 1)),
                "target_scale": torch.rand(batch, 2) + 0.5,
            },
        )
    )


def described(*, batch: int, package: str, name: str, options: dict[str, Any]) -> Example:
    """Return the inputs that a GluonTS model describes, as keyword arguments."""
    with torch.random.fork_rng():
        spec = _gluonts(package, name, options).describe_inputs(batch_size=batch)
    values = {}
    for key, zeros in spec.zeros().items():
        if zeros.dtype == torch.long:
            values[key] = torch.randint(0, KINDS, zeros.shape)
        else:
            values[key] = (
                torch.ones(zeros.shape) if "observed" in key else torch.rand(zeros.shape) + 0.5
            )
    return Example((), values)


def several(*, batch: int) -> Example:
    """Return the inputs of GluonTS' multivariate models, which describe them by half."""
    past = torch.rand(batch, PAST, SERIES) + 0.5
    return Example((past, torch.ones_like(past)))


def _neuralforecast(name: str, options: dict[str, Any], series: int) -> nn.Module:
    models = importlib.import_module("neuralforecast.models")
    several_series = {"n_series": series} if series > 1 else {}
    model: nn.Module = getattr(models, name)(
        h=FUTURE, input_size=PAST, max_steps=1, **several_series, **options
    )
    return model


def _pytorch_forecasting(name: str, options: dict[str, Any], covariates: bool) -> nn.Module:
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet, models

    length = PAST + FUTURE
    table = pd.DataFrame(
        {
            "series": [str(kind) for kind in range(KINDS) for _ in range(length)],
            "day": list(range(length)) * KINDS,
            "value": torch.rand(KINDS * length, generator=torch.Generator().manual_seed(0)).numpy(),
        }
    )
    features = {"static_categoricals": ["series"], "time_varying_known_reals": ["day"]}
    dataset = TimeSeriesDataSet(
        table,
        time_idx="day",
        target="value",
        group_ids=["series"],
        min_encoder_length=PAST,
        max_encoder_length=PAST,
        min_prediction_length=FUTURE,
        max_prediction_length=FUTURE,
        time_varying_unknown_reals=["value"],
        **(features if covariates else {}),
    )
    model: nn.Module = getattr(models, name).from_dataset(dataset, **options)
    return model


def _gluonts(package: str, name: str, options: dict[str, Any]) -> Any:
    module = importlib.import_module(f"gluonts.torch.model.{package}.module")
    if package == "tide":
        distributions = importlib.import_module("gluonts.torch.distributions")
        options = options | {"distr_output": distributions.StudentTOutput()}
    return getattr(module, name)(**options)


def neuralforecast_cases() -> list[Case]:
    importlib.import_module("neuralforecast.models")
    single = [(name, options, 1) for name, options in NEURALFORECAST.items()]
    joint = [(name, options, SERIES) for name, options in MULTIVARIATE.items()]
    return [
        Case(
            name=f"neuralforecast/{name}",
            build=partial(_neuralforecast, name, options, series),
            call=partial(windows, series=series),
            observed=OBSERVED,
            fresh=FRESH,
            inexpressible=SAMPLES if name == "Informer" else "",
        )
        for name, options, series in single + joint
    ]


def pytorch_forecasting_cases() -> list[Case]:
    importlib.import_module("pytorch_forecasting.models")
    return [
        Case(
            name=f"pytorch-forecasting/{name}",
            build=partial(_pytorch_forecasting, name, options, covariates),
            call=partial(frames, covariates=covariates),
            observed=OBSERVED,
            fresh=FRESH,
        )
        for name, (covariates, options) in PYTORCH_FORECASTING.items()
    ]


def gluonts_cases() -> list[Case]:
    importlib.import_module("gluonts.torch.model.deepar.module")
    return [
        Case(
            name=f"gluonts/{name}",
            build=partial(_gluonts, package, name, options),
            call=several
            if name == "ITransformerModel"
            else partial(described, package=package, name=name, options=options),
            observed=OBSERVED,
            fresh=FRESH,
            inexpressible=SAMPLES if name == "DeepARModel" else "",
        )
        for name, (package, options) in GLUONTS.items()
    ]


def cases() -> list[Case]:
    return [*neuralforecast_cases(), *pytorch_forecasting_cases(), *gluonts_cases()]
