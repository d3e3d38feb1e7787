"""Models of Hugging Face's `transformers` -> the layout of a fairseq checkpoint: shape, names of parameters, CTC head.

Takes what `s3distill.compat.load_checkpoint` reads out of a folder; `transformers` itself is not needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.ctc_head import fairseq_order
from s3distill.encoder.folder import MODEL_TYPE, from_folder
from s3distill.encoder.layout import checkpoint_layout
from s3distill.encoder.options import options_from_config

logger = logging.getLogger(__name__)

MODEL_TYPES = {"wav2vec2": "wav2vec2", "hubert": "hubert", "wavlm": "wavlm", "data2vec-audio": "data2vec_audio"}

# what `transformers` takes where config.json leaves it out
_DEFAULTS: dict[str, Any] = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    **{"conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]},
    **{"conv_bias": False, "feat_extract_norm": "group", "hidden_act": "gelu", "do_stable_layer_norm": False},
    **{"num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16},
    **{"num_buckets": 320, "max_bucket_distance": 800, "pad_token_id": 0},
}
_DATA2VEC_DEFAULTS: dict[str, Any] = {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
# what this encoder has no other value for
_EXPECTED: dict[str, Any] = {
    **{"feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "feat_proj_layer_norm": True},
    **{"conv_pos_batch_norm": False, "add_adapter": False, "adapter_attn_dim": None},
}
_ACTIVATIONS = {
    **{"gelu": "gelu", "relu": "relu", "tanh": "tanh", "swish": "swish", "silu": "swish"},
    **{"gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate"},
}

# names in `transformers` -> ours, below the model's own prefix; the conv layers' norms depend on the extractor
_NAMES = [
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.(weight|bias)", r"feature_extractor.conv_layers.\1.0.\2"),
    (r"feature_projection\.layer_norm\.(weight|bias)", r"layer_norm.\1"),
    (r"feature_projection\.projection\.(weight|bias)", r"post_extract_proj.\1"),
    (r"masked_spec_embed", r"mask_emb"),
    (r"encoder\.pos_conv_embed\.conv\.(bias|weight_g|weight_v)", r"encoder.pos_conv.0.\1"),
    (r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0", r"encoder.pos_conv.0.weight_g"),
    (r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1", r"encoder.pos_conv.0.weight_v"),
    (r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.(weight|bias)", r"encoder.pos_conv.\1.0.\2"),
    (r"encoder\.layer_norm\.(weight|bias)", r"encoder.layer_norm.\1"),
    (r"encoder\.layers\.(\d+)\.attention\.([qkv]|out)_proj\.(weight|bias)", r"encoder.layers.\1.self_attn.\2_proj.\3"),
    (r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_linear\.(.*)", r"encoder.layers.\1.self_attn.grep_linear.\2"),
    (r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_const", r"encoder.layers.\1.self_attn.grep_a"),
    (r"encoder\.layers\.0\.attention\.rel_attn_embed\.weight", r"encoder.relative_attention_bias.weight"),
    (r"encoder\.layers\.(\d+)\.layer_norm\.(weight|bias)", r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.(weight|bias)", r"encoder.layers.\1.fc1.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.output_dense\.(weight|bias)", r"encoder.layers.\1.fc2.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)", r"encoder.layers.\1.final_layer_norm.\2"),
]
_CONV_NORM = r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(weight|bias)"
_ENCODER_PARTS = ("feature_extractor.", "feature_projection.", "encoder.", "masked_spec_embed")


def from_huggingface(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What was read out of a folder -> the layout of a fairseq checkpoint.

    Waveforms are normalised as fairseq does it, with an eps of 1e-5 beside the variance; `transformers` adds 1e-7, which
    makes a difference for nearly silent audio only.

    Args:
        state: ``model``: tensors by name; ``huggingface``: the contents of config.json, preprocessor_config.json and
            vocab.json as ``config``, ``preprocessor``, ``vocab``.
        name: what messages call the folder.
    Raises:
        ValueError: not one of `MODEL_TYPES` or a variant that this encoder is not, or the folder is not whole.
    """
    files, weights = state["huggingface"], state["model"]
    config = files["config"]
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE:
        return from_folder(config, weights, name)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{name} holds a model of type {model_type!r} (`model_type` in config.json), which has no wav2vec 2.0-style encoder; "
            f"supported are {', '.join([*MODEL_TYPES, MODEL_TYPE])}"
        )
    family = MODEL_TYPES[model_type]
    encoder = encoder_config(config, name)
    if files.get("preprocessor") is None:
        raise ValueError(
            f"{name} has no preprocessor_config.json, so it is unknown whether waveforms are normalised (do_normalize); get the file "
            'from where the model came from, or write one that holds {"do_normalize": true} or {"do_normalize": false}'
        )
    normalize = bool(files["preprocessor"].get("do_normalize", True))
    inner, outer = _split(weights, family)
    encoder_state = _encoder_state(inner, encoder, name)
    options = options_from_config(encoder, family, normalize)
    is_ctc = any(str(architecture).endswith("ForCTC") for architecture in config.get("architectures") or [])
    if not is_ctc and "lm_head.weight" not in outer:
        # under a name of their own: the speaker model's head, for one, is called feature_extractor
        return checkpoint_layout(
            options,
            encoder_state,
            normalize,
            extra_state={f"transformers.{key}": value for key, value in outer.items()},
        )
    head = {key: outer.pop(f"lm_head.{key}") for key in ("weight", "bias") if f"lm_head.{key}" in outer}
    if len(head) < 2 or files.get("vocab") is None:
        lacking = "no vocab.json" if len(head) == 2 else "no lm_head.weight and lm_head.bias among its weights"
        raise ValueError(f"{name} is a CTC model (ForCTC), but has {lacking}; was it downloaded completely?")
    blank = config.get("pad_token_id", _DEFAULTS["pad_token_id"])
    head, symbols = fairseq_order(head, files["vocab"], blank, name)
    return checkpoint_layout(options, encoder_state, normalize, head, symbols)


def encoder_config(config: Mapping[str, Any], name: str) -> EncoderConfig:
    """config.json of `transformers` -> `EncoderConfig`.

    Raises:
        ValueError: a setting that this encoder lacks.
    """
    for key, expected in _EXPECTED.items():
        if config.get(key, expected) != expected:
            raise ValueError(
                f"`{key}` = {config[key]!r} in config.json of {name} is not supported by s3distill's encoder; it must be {expected!r}"
            )
    data2vec, wavlm = config["model_type"] == "data2vec-audio", config["model_type"] == "wavlm"
    defaults = _DEFAULTS | (_DATA2VEC_DEFAULTS if data2vec else {})
    values = {key: config.get(key, default) for key, default in defaults.items()}
    dim, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    shapes = [values[key] for key in ("conv_dim", "conv_kernel", "conv_stride")]
    rules = (
        (values["hidden_act"] in _ACTIVATIONS, f"`hidden_act` must be one of {', '.join(_ACTIVATIONS)}", "hidden_act"),
        (dim % heads == 0, f"`hidden_size` ({dim}) must be a multiple of `num_attention_heads`", "num_attention_heads"),
        (len({*map(len, shapes)}) == 1, "`conv_dim`, `conv_kernel` and `conv_stride` must be equally long", "conv_dim"),
    )
    for holds, rule, key in rules:
        if not holds:
            raise ValueError(f"in config.json of {name} {rule}, but `{key}` is {values[key]!r}")
    kernel, depth = _positional_conv(values, data2vec, name)
    return EncoderConfig(
        conv_layers=tuple(ConvLayerConfig(int(c), int(k), int(s)) for c, k, s in zip(*shapes, strict=True)),
        embed_dim=dim,
        layers=uniform_layers(
            int(values["num_hidden_layers"]), heads, dim // heads, int(values["intermediate_size"]), wavlm
        ),
        # data2vec's classes know neither GroupNorm nor pre-LN layers, whatever its config.json says
        extractor_mode="layer_norm" if data2vec or values["feat_extract_norm"] == "layer" else "default",
        conv_bias=bool(values["conv_bias"]),
        layer_norm_first=bool(values["do_stable_layer_norm"]) and not data2vec,
        project_features=True,
        activation=_ACTIVATIONS[values["hidden_act"]],
        pos_conv_kernel=kernel,
        pos_conv_groups=int(values["num_conv_pos_embedding_groups"]),
        pos_conv_depth=depth,
        position_buckets=int(values["num_buckets"]) if wavlm else 0,
        position_max_distance=int(values["max_bucket_distance"]) if wavlm else 800,
        position_heads=heads if wavlm else 0,
    )


def _positional_conv(values: Mapping[str, Any], data2vec: bool, name: str) -> tuple[int, int]:
    """Kernel and depth; data2vec's ``num_conv_pos_embeddings`` is the depth of its stack, and its kernel stands apart."""
    number = int(values["num_conv_pos_embeddings"])
    if not data2vec:
        return number, 1
    kernel = int(values["conv_pos_kernel_size"])
    if number < 2 or kernel < 3:
        raise ValueError(
            f"the positional convolution of {name} must be a stack of at least 2 (`num_conv_pos_embeddings`) with kernels of at least "
            f"3 (`conv_pos_kernel_size`), but is {number} of {kernel}"
        )
    return number * kernel, number


def _split(weights: Mapping[str, Tensor], family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the model itself, without its prefix, and those of what stands on it (``lm_head``, quantizer, ...)."""
    prefix = f"{family}."
    if not any(name.startswith(prefix) for name in weights):  # a bare model, without anything on it
        return dict(weights), {}
    inner = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return inner, {name: value for name, value in weights.items() if not name.startswith(prefix)}


def _encoder_state(weights: Mapping[str, Tensor], config: EncoderConfig, name: str) -> dict[str, Tensor]:
    norm = r"feature_extractor.conv_layers.\1.2.1.\2"
    if config.extractor_mode == "default":
        norm = r"feature_extractor.conv_layers.\1.2.\2"
    rules = [(re.compile(pattern), ours) for pattern, ours in [*_NAMES, (_CONV_NORM, norm)]]
    state, unknown = {}, []
    for key, value in weights.items():
        ours = next((match.expand(new) for old, new in rules if (match := old.fullmatch(key))), None)
        if ours is not None:
            state[ours] = value
        elif key.startswith(_ENCODER_PARTS):
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{name} has encoder parameters that s3distill's encoder has not, {unknown[:5]} ({len(unknown)} in all): it is of another "
            "architecture, and leaving them out would compute something else"
        )
    if "mask_emb" not in state:  # `transformers` leaves it out where config.json asks for no SpecAugment masks
        logger.info("%s has no mask embedding: masked frames are zeros until it is trained", name)
        state["mask_emb"] = torch.zeros(config.embed_dim)
    return state
