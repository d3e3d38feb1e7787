"""fairseq's model options and `EncoderConfig`, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers

# names of encoder models whose options are fairseq's wav2vec 2.0 options, with what differs
FAMILIES = ("wav2vec2", "hubert", "data2vec_audio", "wavlm", "ssl_student")

# fairseq's and WavLM's defaults for options that old checkpoints do not carry
_DEFAULTS: dict[str, Any] = {
    "extractor_mode": "default",
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "pos_conv_depth": 1,
    "relative_position_embedding": False,
    "num_buckets": 320,
    "max_distance": 800,
}

# `ssl_student`'s options of shape that no other model has, with the values that change nothing; see `variant_options`
VARIANT_OPTIONS: dict[str, Any] = {
    **{"separable_conv_layers": (), "time_reduction": 1, "shared": "none", "shared_group": 0},
    **{"attention": "full", "attention_window": 0, "attention_global": 0},
    **{"linformer_dim": 0, "linformer_max_frames": 0, "reuse_attention_layers": ()},
}

# What fine-tuning sets in the encoder that it starts from: stock fairseq hands over only what the file lists.
_TRAINING_OPTIONS: dict[str, Any] = {
    **{"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.0},
    **{"encoder_layerdrop": 0.0, "feature_grad_mult": 1.0, "checkpoint_activations": False},
    **{"mask_prob": 0.0, "mask_length": 10, "mask_selection": "static", "mask_other": 0.0, "no_mask_overlap": False},
    **{"mask_min_space": 1, "mask_channel_prob": 0.0, "mask_channel_length": 10, "mask_channel_selection": "static"},
    **{"mask_channel_other": 0.0, "no_mask_channel_overlap": False, "mask_channel_min_space": 1},
    **{"mask_channel_before": False, "require_same_masks": True, "mask_dropout": 0.0},
}


def config_from_options(options: Mapping[str, Any], family: str) -> EncoderConfig:
    """fairseq's model options -> `EncoderConfig`.

    Args:
        options: e.g. ``cfg["model"]`` of a checkpoint; missing ones take fairseq's defaults.
        family: one of `FAMILIES`; data2vec always projects its features, the others only where widths differ.
    Raises:
        ValueError: the options describe something that this encoder is not (conformer layers, quantised input, ...).
    """
    if options.get("encoder"):
        return EncoderConfig.from_json(str(options["encoder"]))
    for name, expected in (("layer_type", "transformer"), ("quantize_input", False), ("conv_pos_batch_norm", False)):
        value = options.get(name, expected)
        if value not in (expected, None):
            raise ValueError(f"`{name}` = {value!r} is not supported by s3distill's encoder; it must be {expected!r}")
    values = {
        name: default if options.get(name) is None else getattr(options[name], "value", options[name])
        for name, default in _DEFAULTS.items()
    }
    conv_layers = parse_conv_layers(str(values["conv_feature_layers"]))
    dim, heads = int(values["encoder_embed_dim"]), int(values["encoder_attention_heads"])
    if dim % heads != 0:
        raise ValueError(f"`encoder_embed_dim` ({dim}) must be a multiple of `encoder_attention_heads` ({heads})")
    biased = bool(values["relative_position_embedding"])
    if biased and not options.get("gru_rel_pos", True):
        raise ValueError(
            "`gru_rel_pos` = False is not supported by s3distill's encoder where `relative_position_embedding` is set; it must be True, "
            "as in the released WavLM models"
        )
    variants = variant_options(options) if family == "ssl_student" else dict(VARIANT_OPTIONS)
    separable, reusing = variants.pop("separable_conv_layers"), variants.pop("reuse_attention_layers")
    layers = uniform_layers(
        int(values["encoder_layers"]), heads, dim // heads, int(values["encoder_ffn_embed_dim"]), biased
    )
    return EncoderConfig(
        conv_layers=_with(conv_layers, separable, "separable_conv_layers", separable=True),
        embed_dim=dim,
        layers=_with(layers, reusing, "reuse_attention_layers", reuses_attention=True),
        extractor_mode=str(values["extractor_mode"]),
        conv_bias=bool(values["conv_bias"]),
        layer_norm_first=bool(values["layer_norm_first"]),
        project_features=family == "data2vec_audio" or conv_layers[-1].channels != dim,
        activation=str(values["activation_fn"]),
        pos_conv_kernel=int(values["conv_pos"]),
        pos_conv_groups=int(values["conv_pos_groups"]),
        pos_conv_depth=int(values["pos_conv_depth"]),
        position_buckets=int(values["num_buckets"]) if biased else 0,
        position_max_distance=int(values["max_distance"]) if biased else 800,
        position_heads=heads if biased else 0,
        **variants,
    )


def variant_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `VARIANT_OPTIONS`, those that change nothing where ``options`` has none; lists become tuples of integers."""
    values = {}
    for name, default in VARIANT_OPTIONS.items():
        value = default if options.get(name) is None else getattr(options[name], "value", options[name])
        values[name] = tuple(int(v) for v in value) if isinstance(default, tuple) else type(default)(value)
    return values


def _with(shapes: tuple[Any, ...], indices: Sequence[int], option: str, **changes: Any) -> tuple[Any, ...]:
    """``shapes`` with ``changes`` at ``indices``, which ``option`` names."""
    lacking = [i for i in indices if not 0 <= i < len(shapes)]
    if lacking or len(set(indices)) < len(indices):
        raise ValueError(
            f"`{option}` must name different layers, 0 to {len(shapes) - 1} (counted from 0), but is {list(indices)}"
        )
    return tuple(replace(shape, **changes) if i in indices else shape for i, shape in enumerate(shapes))


def options_from_config(config: EncoderConfig, family: str, normalize: bool) -> dict[str, Any]:
    """`EncoderConfig` -> options from which `config_from_options` gives it again.

    Returns:
        those of ``family``'s model where it can have this shape, else of `ssl_student`, which has any; ``_name`` says which.
    """
    options = None if family == "ssl_student" else _uniform_options(config)
    if config.position_buckets > 0 and family != "wavlm":
        options = None
    if options is None or config_from_options(options, family) != config:
        whole = {"encoder": config.to_json(), "encoder_embed_dim": config.output_dim, "seed": 1}
        return {"_name": "ssl_student", **whole, "normalize": normalize, **_TRAINING_OPTIONS}
    return {"_name": family, **options, "normalize": normalize, **_TRAINING_OPTIONS}


def stock_options(config: EncoderConfig, family: str, normalize: bool) -> dict[str, Any]:
    """`options_from_config` for a file that stock `wav2vec_ctc` fine-tunes, of a model that fairseq knows wherever one has the shape.

    It builds no HuBERT, whose encoder is wav2vec 2.0's, and there is no WavLM in fairseq: that one is `ssl_student`'s.
    """
    return options_from_config(config, {"hubert": "wav2vec2", "wavlm": "ssl_student"}.get(family, family), normalize)


def _uniform_options(config: EncoderConfig) -> dict[str, Any] | None:
    """fairseq's options for this shape, which may say less than the config does; None where layers differ."""
    if not config.layers or len(set(config.layers)) > 1:
        return None
    layer = config.layers[0]
    num_heads = max(1, layer.num_heads)
    if config.embed_dim % num_heads != 0:
        return None
    options = {
        "extractor_mode": config.extractor_mode,
        "conv_feature_layers": str([(c.channels, c.kernel, c.stride) for c in config.conv_layers]),
        "conv_bias": config.conv_bias,
        "encoder_layers": config.num_layers,
        "encoder_embed_dim": config.embed_dim,
        "encoder_ffn_embed_dim": layer.ffn_dim,
        "encoder_attention_heads": num_heads,
        "activation_fn": config.activation,
        "layer_norm_first": config.layer_norm_first,
        "conv_pos": config.pos_conv_kernel,
        "conv_pos_groups": config.pos_conv_groups,
        "pos_conv_depth": config.pos_conv_depth,
    }
    if config.position_buckets > 0:
        options |= {"relative_position_embedding": True, "gru_rel_pos": True}
        options |= {"num_buckets": config.position_buckets, "max_distance": config.position_max_distance}
    return options
