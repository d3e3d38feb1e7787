"""Small encoders of every variant, and of those that can be combined."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.training_config import TrainingConfig

PLAIN = EncoderConfig(
    (ConvLayerConfig(12, 10, 5), ConvLayerConfig(10, 3, 2), ConvLayerConfig(8, 2, 2)),
    16,
    uniform_layers(4, 4, 4, 20),
    pos_conv_kernel=6,
    pos_conv_groups=4,
)


def changed(config: EncoderConfig = PLAIN, **changes: object) -> EncoderConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def reusing(config: EncoderConfig, *indices: int) -> EncoderConfig:
    """Layers ``indices`` apply the map of the nearest other layer before them."""
    layers = tuple(dataclasses.replace(x, reuses_attention=i in indices) for i, x in enumerate(config.layers))
    return changed(config, layers=layers)


def separated(config: EncoderConfig, *indices: int) -> EncoderConfig:
    convs = tuple(dataclasses.replace(c, separable=i in indices) for i, c in enumerate(config.conv_layers))
    return changed(config, conv_layers=convs)


PRE_LN = changed(extractor_mode="layer_norm", layer_norm_first=True, conv_bias=True)
POINTWISE = changed(
    conv_layers=(
        ConvLayerConfig(6, 10, 5),
        ConvLayerConfig(12, 1, 1),
        ConvLayerConfig(8, 3, 2),
        ConvLayerConfig(10, 1, 1),
    )
)
WAVLM = changed(
    layers=uniform_layers(4, 4, 4, 20, position_bias=True),
    position_buckets=8,
    position_max_distance=20,
    position_heads=4,
)
WINDOWED = changed(attention="windowed", attention_window=5, attention_global=2)
LINFORMER = changed(attention="linformer", linformer_dim=6, linformer_max_frames=400)
UNEQUAL = reusing(
    changed(
        layers=(
            LayerConfig(4, 3, 20),
            LayerConfig(4, 5, 20),  # heads of another width apply the same map
            LayerConfig(0, 3, 20, attention=False),
            LayerConfig(4, 3, 8),
            LayerConfig(2, 3, 0, ffn=False),
            LayerConfig(2, 4, 20),
        )
    ),
    *(1, 3, 5),
)

VARIANTS = {
    "separable": separated(PLAIN, 1, 2),
    "separable_pre_ln": separated(PRE_LN, 2),
    "pointwise": POINTWISE,
    "pointwise_separable": separated(POINTWISE, 1, 2),
    "time_reduction": changed(time_reduction=2),
    "time_reduction_3_pre_ln": changed(PRE_LN, time_reduction=3),
    "shared_all": changed(shared="all"),
    "shared_all_pre_ln": changed(PRE_LN, shared="all", shared_group=2),
    "shared_attention": changed(shared="attention", shared_group=3),
    "shared_ffn": changed(shared="ffn", shared_group=2),
    "shared_ffn_pre_ln": changed(PRE_LN, shared="ffn"),
    "shared_wavlm": changed(WAVLM, shared="attention", shared_group=2),
    "windowed": WINDOWED,
    "windowed_local": changed(attention="windowed", attention_window=20),
    "windowed_pre_ln": changed(PRE_LN, attention="windowed", attention_window=3, attention_global=7),
    "linformer": LINFORMER,
    "linformer_pre_ln": changed(PRE_LN, attention="linformer", linformer_dim=4, linformer_max_frames=300),
    "reused": reusing(PLAIN, 1, 3),
    "reused_pre_ln": reusing(PRE_LN, 1, 2, 3),
    "reused_unequal": UNEQUAL,
    "reused_wavlm": reusing(WAVLM, 1, 3),
    "everything_shared_windowed": separated(changed(WINDOWED, shared="all", shared_group=2, time_reduction=2), 1, 2),
    "everything_reused": separated(
        reusing(changed(time_reduction=2, shared="ffn"), 1, 3), 1, 2
    ),  # FitHuBERT's, ARMHuBERT's and ALBERT's
    "everything_linformer": separated(changed(LINFORMER, shared="attention", time_reduction=2), 2),
}


def new_encoder(config: EncoderConfig, training: TrainingConfig | None = None, seed: int = 0) -> SpeechEncoder:
    """Random weights, biases and norms included, so that nothing is trivially right."""
    torch.manual_seed(seed)
    encoder = SpeechEncoder(config, training).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def make_batch(lengths: list[int], seed: int = 0, filler: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    source = torch.randn(len(lengths), max(lengths), generator=generator) + 0.1
    return source.masked_fill(padding_mask, filler), padding_mask
