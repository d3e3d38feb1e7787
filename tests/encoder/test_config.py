"""`EncoderConfig`: JSON, fairseq's list expressions without `eval`, frame arithmetic, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.encoder.checkpoint import config_from_options
from s3distill.encoder.config import (
    ACTIVATIONS,
    EXTRACTOR_MODES,
    ConvLayerConfig,
    EncoderConfig,
    LayerConfig,
    parse_conv_layers,
    uniform_layers,
)

RELEASED = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"

conv_layers = st.builds(ConvLayerConfig, st.integers(1, 8), st.integers(1, 12), st.integers(1, 6))
layers = st.builds(
    LayerConfig, st.integers(0, 4), st.integers(1, 9), st.integers(0, 50), attention=st.booleans(), ffn=st.booleans()
)
configs = st.builds(
    EncoderConfig,
    conv_layers=st.lists(conv_layers, min_size=1, max_size=4).map(tuple),
    embed_dim=st.integers(1, 4).map(lambda n: 6 * n),
    layers=st.lists(layers, max_size=4).map(tuple),
    extractor_mode=st.sampled_from(EXTRACTOR_MODES),
    conv_bias=st.booleans(),
    layer_norm_first=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    pos_conv_kernel=st.integers(1, 128),
    pos_conv_groups=st.sampled_from([1, 2, 3, 6]),
    pos_conv_depth=st.integers(1, 5),
    group_norm_over_padding=st.booleans(),
)


def small(**options: Any) -> EncoderConfig:
    values = {"conv_layers": (ConvLayerConfig(8, 10, 5),), "embed_dim": 16, "layers": uniform_layers(1, 2, 8, 16)}
    return EncoderConfig(**{**values, **options})


@given(configs)
def test_json_gives_the_same_config(config: EncoderConfig) -> None:
    text = config.to_json()
    assert "\n" not in text and EncoderConfig.from_json(text) == config
    assert EncoderConfig.from_dict(json.loads(text)) == config
    assert hash(EncoderConfig.from_json(text)) == hash(config)
    assert config_from_options({"encoder": text, "encoder_layers": 99}, "ssl_student") == config


def test_unreadable_json_and_unknown_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"not valid JSON .*; it starts with '\{oops'"):
        EncoderConfig.from_json("{oops")
    values = {**small().to_dict(), "num_experts": 4}
    with pytest.raises(ValueError, match=r"unknown keys \['num_experts'\]; known are .*'embed_dim'.* upgrade"):
        EncoderConfig.from_dict(values)


FAULTS = [
    ({"conv_layers": ()}, "`conv_layers` must name at least one layer, but is empty"),
    ({"extractor_mode": "rms"}, "`extractor_mode` must be one of default, layer_norm, but is 'rms'"),
    ({"activation": "silu"}, "`activation` must be one of gelu, relu, gelu_accurate, tanh, swish, but is 'silu'"),
    ({"embed_dim": 0}, "`embed_dim` must be positive, but is 0"),
    ({"embed_dim": 24}, r"`embed_dim` \(24\) must be a multiple of `pos_conv_groups` \(16\)"),
    ({"project_features": False}, r"last conv layer's channels \(8\) must equal `embed_dim` \(16\)"),
    ({"conv_layers": (ConvLayerConfig(8, 0, 1),)}, "conv layer 0 must have positive channels, kernel and stride"),
    ({"layers": (LayerConfig(1, 8, 4), LayerConfig(-1, 8, 4))}, "layer 1 must have num_heads >= 0"),
    ({"layers": (LayerConfig(1, 0, 4),)}, "layer 0 must have num_heads >= 0, head_dim > 0"),
    ({"layers": (LayerConfig(1, 8, -1),)}, "and ffn_dim >= 0, but is"),
]


@pytest.mark.parametrize(("options", "message"), FAULTS)
def test_impossible_shapes_are_refused(options: dict, message: str) -> None:
    small()
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().embed_dim = 3  # type: ignore[misc]


@given(st.lists(conv_layers, min_size=1, max_size=3).map(tuple), st.integers(1, 400))
@settings(deadline=None, max_examples=60)
def test_frames_are_what_convolutions_give(shape: tuple[ConvLayerConfig, ...], num_samples: int) -> None:
    config = small(conv_layers=shape)
    x = torch.zeros(1, 1, num_samples)
    for conv in shape:
        if x.shape[-1] < conv.kernel:
            x = x[:, :, :0]
            break
        x = torch.nn.functional.conv1d(x, torch.zeros(1, 1, conv.kernel), stride=conv.stride)
    num_frames = x.shape[-1]
    assert max(0, config.num_frames(num_samples)) == num_frames
    assert (num_samples >= config.receptive_field) == (num_frames > 0)
    assert config.num_frames(torch.tensor([num_samples])).tolist() == [config.num_frames(num_samples)]
    assert config.num_frames(config.receptive_field) == 1
    assert config.num_frames(config.receptive_field + config.frame_stride) == 2
    assert config.num_frames(config.receptive_field + config.frame_stride - 1) == 1


def test_released_models_have_frames_of_20_ms() -> None:
    config = small(conv_layers=parse_conv_layers(RELEASED))
    assert (config.frame_stride, config.receptive_field, config.num_frames(16_000)) == (320, 400, 49)


@pytest.mark.parametrize(
    "text",
    [
        RELEASED,
        "[(512,10,5)]",
        "  [(1,2,3)]*2 + 3*[(4,5,6)] ",
        "[[1, 2, 3], (4, 5, 6)]",
        "([(8, 10, 5)] + [(8, 3, 2)]) * 2",
    ],
)
def test_list_expressions_mean_what_eval_gives(text: str) -> None:
    assert [dataclasses.astuple(layer) for layer in parse_conv_layers(text)] == [tuple(c) for c in eval(text.strip())]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path('ran').touch()",
        "[(512, 10, 5)] + [open('ran', 'w')]",
        "[(512, 10, 5) for _ in open('ran', 'w').name]",
        "(lambda: open('ran', 'w'))()",
        "[(512, 10, 5)].__class__",
        "[(512, 10, 5)][0:1]",
        'f\'{open("ran", "w")}\'',
        "(x := [(512, 10, 5)])",
        "import os",
        "[(512, 10, 5)] * 99999999999999999999",
        "[(512, 10, 5)] * 10**12",
        "[(512, 10, 5)] * 1000000000",
        "[(512, 10)]",
        "[(512, 10, 5.5)]",
        "[('512', 10, 5)]",
        "[512, 10, 5]",
        "512",
        "",
        "(" * 500,
        "[" * 150 + "]" * 150,
        "+".join(["[(1, 1, 1)]"] * 20000),
        "[(1, 1, 1)\0]",
        "layers",
    ],
    ids=lambda text: text[:30],
)
def test_anything_else_is_refused_and_runs_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`conv_feature_layers` must be a list of \(channels, kernel, stride\)"):
        parse_conv_layers(text)
    assert not list(tmp_path.iterdir())


def test_options_of_fairseq_give_the_shape() -> None:
    config = config_from_options({}, "wav2vec2")  # old checkpoints leave out what is fairseq's default
    assert (config.embed_dim, config.num_layers, len(config.conv_layers)) == (768, 12, 7)
    assert config.layers[0] == LayerConfig(num_heads=12, head_dim=64, ffn_dim=3072)
    assert (config.extractor_mode, config.layer_norm_first, config.pos_conv_kernel) == ("default", False, 128)
    assert config.project_features
    same_width = {"encoder_embed_dim": 512, "encoder_attention_heads": 8}
    assert not config_from_options(same_width, "wav2vec2").project_features
    assert config_from_options(same_width, "data2vec_audio").project_features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_type": "conformer"}, "`layer_type` = 'conformer' is not supported .* must be 'transformer'"),
        ({"quantize_input": True}, "`quantize_input` = True is not supported"),
        ({"conv_pos_batch_norm": True}, "`conv_pos_batch_norm` = True is not supported"),
        ({"encoder_attention_heads": 7}, r"`encoder_embed_dim` \(768\) must be a multiple of .* \(7\)"),
        ({"conv_feature_layers": "exit()"}, "`conv_feature_layers` must be a list"),
    ],
)
def test_options_that_this_encoder_lacks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_options(options, "wav2vec2")
