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
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import options_from_config, stock_options
from s3distill.gates import GateCounts, breakdown, count_macs_per_second, count_parameters

LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
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


@st.composite
def biased_configs(draw: st.DrawFn) -> EncoderConfig:
    """Encoders with a position bias whose layers kept any of its six heads."""
    config = draw(configs)
    kept = [draw(st.sets(st.integers(0, 5))) for _ in config.layers]
    biased = (
        dataclasses.replace(layer, num_heads=len(heads), position_heads=tuple(sorted(heads)))
        for layer, heads in zip(config.layers, kept, strict=True)
    )
    return dataclasses.replace(config, layers=tuple(biased), position_buckets=20, position_heads=6)


def small(**options: Any) -> EncoderConfig:
    values = {"conv_layers": (ConvLayerConfig(8, 10, 5),), "embed_dim": 16, "layers": uniform_layers(1, 2, 8, 16)}
    return EncoderConfig(**{**values, **options})


@given(configs | biased_configs())
@settings(deadline=None)
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
    assert [(c.channels, c.kernel, c.stride) for c in parse_conv_layers(text)] == [tuple(c) for c in eval(text.strip())]


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


XLS_R = {
    "1B": ({"encoder_embed_dim": 1280, "encoder_ffn_embed_dim": 5120}, 962_497_408),
    "2B": ({"encoder_embed_dim": 1920, "encoder_ffn_embed_dim": 7680}, 2_159_259_648),
}


@pytest.mark.parametrize("name", XLS_R)
def test_xls_r_builds_and_is_counted(name: str) -> None:
    shape, num_parameters = XLS_R[name]
    config = config_from_options({**LARGE, "encoder_layers": 48, "encoder_attention_heads": 16, **shape}, "wav2vec2")
    dim = shape["encoder_embed_dim"]
    assert config.layers == uniform_layers(48, 16, dim // 16, 4 * dim)
    with torch.device("meta"):
        encoder = SpeechEncoder(config)
        out = encoder(torch.empty(2, 16000))
    assert out.x.shape == (2, 49, dim) and len(out.hidden_states) == 49
    full = GateCounts.full(config)
    parts = breakdown(config, full)
    assert parts["attention"] == 48 * 4 * (dim + 1) * dim
    assert parts["ffn"] == 48 * (8 * dim * dim + 5 * dim)
    assert parts["pos_conv"] == dim * (dim // 16) * 128 + dim + 128
    assert count_parameters(config, full) == sum(p.numel() for p in encoder.parameters()) == num_parameters
    matrices = 48 * 12 * dim * dim + 512 * dim  # of attention, FFN and projection: one MAC per weight and frame
    quadratic = 48 * 2 * dim * 499 * 499
    conv = breakdown(config, full, "macs")["conv"] * 10 + dim * (dim // 16) * 128 * 500
    assert count_macs_per_second(config, full) * 10 == pytest.approx(matrices * 499 + quadratic + conv)


SHAPES = {
    "wav2vec2": {},
    "hubert": LARGE,
    "data2vec_audio": {"extractor_mode": "layer_norm", "conv_pos": 95, "pos_conv_depth": 5},
    "wavlm": {"relative_position_embedding": True, "num_buckets": 160, "max_distance": 400},
}


@pytest.mark.parametrize("family", SHAPES)
def test_a_shape_gives_the_options_that_give_it(family: str) -> None:
    config = config_from_options(SHAPES[family], family)
    options = options_from_config(config, family, normalize=True)
    assert options["_name"] == family and options["normalize"] is True and "encoder" not in options
    assert config_from_options(options, family) == config
    stock = stock_options(config, family, normalize=True)
    assert stock["_name"] == {"hubert": "wav2vec2", "wavlm": "ssl_student"}.get(family, family)
    assert config_from_options(stock, stock["_name"]) == config


def test_a_shape_that_no_options_have_is_a_student() -> None:
    base = config_from_options({}, "wav2vec2")
    wavlm = config_from_options(SHAPES["wavlm"], "wavlm")
    pruned = dataclasses.replace(
        wavlm, layers=(dataclasses.replace(wavlm.layers[0], num_heads=1, position_heads=(3,)),)
    )
    others = {
        "mixed": dataclasses.replace(base, layers=(LayerConfig(12, 64, 8), LayerConfig(12, 64, 9))),
        "narrow": dataclasses.replace(base, layers=uniform_layers(2, 12, 32, 3072)),
        "headless": dataclasses.replace(base, layers=uniform_layers(2, 0, 64, 3072)),
        "uneven": dataclasses.replace(base, layers=uniform_layers(2, 7, 64, 3072)),
        "empty": dataclasses.replace(base, layers=()),
        "projected": config_from_options({"encoder_embed_dim": 512, "encoder_attention_heads": 8}, "data2vec_audio"),
        "padding": dataclasses.replace(base, group_norm_over_padding=True),
        "foreign bias": wavlm,
        "pruned bias": pruned,
    }
    for name, config in others.items():
        family = "wavlm" if name == "pruned bias" else "wav2vec2"
        options = options_from_config(config, family, normalize=False)
        assert options["_name"] == "ssl_student" and options["encoder_embed_dim"] == config.embed_dim, name
        assert config_from_options(options, "ssl_student") == config


def test_options_of_files_are_fairseqs_own() -> None:
    """Stock fine-tuning hands its masks and dropouts over only to options that the file lists."""
    pytest.importorskip("fairseq")
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    import s3distill  # noqa: F401  registers ssl_student and data2vec_audio

    handed_over = {
        *("dropout", "activation_dropout", "dropout_input", "attention_dropout", "mask_length", "mask_prob"),
        *(
            "require_same_masks",
            "mask_selection",
            "mask_other",
            "no_mask_overlap",
            "mask_channel_length",
            "mask_dropout",
        ),
        *("mask_channel_prob", "mask_channel_before", "mask_channel_selection", "mask_channel_other"),
        *("no_mask_channel_overlap", "encoder_layerdrop", "feature_grad_mult", "checkpoint_activations"),
    }
    for family in ("wav2vec2", "data2vec_audio", "wavlm"):
        options = stock_options(config_from_options(SHAPES[family], family), family, normalize=False)
        known = {f.name for f in dataclasses.fields(MODEL_DATACLASS_REGISTRY[options["_name"]])}
        assert set(options) - {"_name", "normalize"} <= known, family
        assert handed_over <= set(options), family
