"""Variants of the encoder: which layer owns which parameters, and which options of a config contradict each other.

- depthwise-separable convolutions in the extractor (Howard et al., 2017, section 3.1);
- time reduction in front of the layers (Lee et al., 2022, FitHuBERT);
- parameters shared between layers (Lan et al., 2020, ALBERT, section 3.1);
- windowed attention with global frames (Beltagy et al., 2020), Linformer's (Wang et al., 2020);
- attention maps that later layers apply again (Jang et al., 2023, Recycle-and-Distill).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3distill.encoder.config import EncoderConfig

SHARED = ("none", "all", "attention", "ffn")
ATTENTIONS = ("full", "windowed", "linformer")
PARTS = ("attention", "ffn", "norms")  # of a layer; what can have an owner


def owner(config: EncoderConfig, part: str, layer: int) -> int:
    """The layer whose parameters ``layer`` uses for ``part`` (of `PARTS`): the first of its group, or itself."""
    if config.shared not in ("all", part):
        return layer
    return layer - layer % (config.shared_group or max(1, config.num_layers))


def map_source(config: EncoderConfig, layer: int) -> int:
    """The layer that computed the attention map that ``layer`` applies: the nearest earlier one, or itself."""
    if not config.layers[layer].reuses_attention:
        return layer
    return next(i for i in reversed(range(layer)) if _computes_map(config, i))


def keeps_map(config: EncoderConfig, layer: int) -> bool:
    """Whether a later layer applies the attention map of ``layer`` again."""
    later = range(layer + 1, config.num_layers)
    return config.layers[layer].num_heads > 0 and any(map_source(config, i) == layer for i in later)


def gate_owners(config: EncoderConfig, unit: str) -> tuple[int, ...]:
    """Per layer the one whose gates it has: layers that share parameters or an attention map are pruned alike.

    Args:
        unit: one of `gates.UNITS`; empty for units that are no part of a Transformer layer.
    """
    layers = range(config.num_layers)
    if unit in ("head", "attention_layer"):
        return tuple(map_source(config, owner(config, "attention", i)) for i in layers)
    return tuple(owner(config, "ffn", i) for i in layers) if unit in ("ffn", "ffn_layer") else ()


def describe_variants(config: EncoderConfig) -> list[str]:
    """What of an encoder is not wav2vec 2.0's, a line each."""
    lines = []
    if config.time_reduction > 1:
        lines.append(f"time reduction: {config.time_reduction} frames become one, every {config.frame_stride} samples")
    if config.shared != "none":
        what = {"all": "all parameters", "attention": "their attention", "ffn": "their FFN"}[config.shared]
        groups = f"groups of {config.shared_group} layers share" if config.shared_group else "all layers share"
        lines.append(f"{groups} {what}")
    if config.attention == "windowed":
        lines.append(
            f"attention to {config.attention_window} frames on each side, and to and from the first {config.attention_global}"
        )
    if config.attention == "linformer":
        lines.append(
            f"Linformer's attention: {config.linformer_max_frames} frames at most become {config.linformer_dim}"
        )
    return lines


def check_variants(config: EncoderConfig) -> None:
    """Raises `ValueError` where the options of a variant are out of range or contradict each other."""
    _require(
        config.time_reduction >= 1,
        f"`time_reduction` is the number of frames that become one and must be at least 1, but is {config.time_reduction}; 2 halves "
        "the frame rate",
    )
    _require(
        not config.conv_layers[0].separable,
        "conv layer 0 cannot be `separable`: it has one input channel, so that there is nothing to separate; leave it out "
        "(separable layers are counted from 0)",
    )
    _check_sharing(config)
    _check_attention(config)
    for i, layer in enumerate(config.layers):
        if layer.reuses_attention:
            _check_reuse(config, i)


def _check_sharing(config: EncoderConfig) -> None:
    _require(config.shared in SHARED, f"`shared` must be one of {', '.join(SHARED)}, but is {config.shared!r}")
    size = config.shared_group
    if config.shared == "none":
        _require(
            size == 0,
            f"`shared_group` is the number of layers that share parameters, but is {size} where `shared` is none; leave it at 0",
        )
        return
    _require(
        size == 0 or 2 <= size <= config.num_layers,
        f"`shared_group` must be 0 (all layers are one group) or from 2 to the number of layers, {config.num_layers}, but is {size}",
    )
    for i, layer in enumerate(config.layers):
        first = config.layers[owner(config, config.shared, i)]
        attention = [(x.attention, x.num_heads, x.head_dim, x.position_heads) for x in (first, layer)]
        ffn = [(x.ffn, x.ffn_dim) for x in (first, layer)]
        same = (config.shared == "ffn" or attention[0] == attention[1]) and (
            config.shared == "attention" or ffn[0] == ffn[1]
        )
        _require(
            same,
            f"layers that share parameters (`shared` = {config.shared}) must have the same shape, but layer {i} is {layer}, and the "
            f"first of its group {first}; give all layers of a group the same shape",
        )


def _check_attention(config: EncoderConfig) -> None:
    kind = config.attention
    _require(kind in ATTENTIONS, f"`attention` must be one of {', '.join(ATTENTIONS)}, but is {kind!r}")
    options = {
        "windowed": ("attention_window", "attention_global"),
        "linformer": ("linformer_dim", "linformer_max_frames"),
    }
    for other, names in options.items():
        for name in names if other != kind else ():
            value = getattr(config, name)
            _require(
                value == 0, f"`{name}` belongs to `attention` = {other}, but is {value} with {kind}; leave it at 0"
            )
    if kind == "windowed":
        _require(
            config.attention_window >= 1 and config.attention_global >= 0,
            "`attention_window` must be at least 1 frame on each side and `attention_global` at least 0, but they are "
            f"{config.attention_window} and {config.attention_global}; 50 frames are a second",
        )
    if kind == "linformer":
        _require(
            1 <= config.linformer_dim <= config.linformer_max_frames,
            "`linformer_dim` must be from 1 to `linformer_max_frames`, the frames of the longest utterance, but they are "
            f"{config.linformer_dim} and {config.linformer_max_frames}",
        )
    _require(
        kind == "full" or config.position_buckets == 0,
        f"`attention` = {kind} cannot have WavLM's position bias, which is for every pair of frames; set `position_buckets` to 0, or "
        "`attention` to full",
    )


def _check_reuse(config: EncoderConfig, i: int) -> None:
    """Layer ``i`` can apply another layer's attention map."""
    layer = config.layers[i]
    _require(
        config.attention == "full",
        f"`reuses_attention` of layer {i} needs attention maps over all pairs of frames, but `attention` is {config.attention}; set it "
        "to full",
    )
    _require(
        config.shared in ("none", "ffn"),
        f"`reuses_attention` of layer {i} cannot be combined with `shared` = {config.shared}: a layer that applies another's map has no "
        "projection of queries and keys, which the layers of a group would share; set `shared` to none or ffn",
    )
    _require(
        layer.attention, f"layer {i} must have attention to reuse a map, but has none; set `reuses_attention` to false"
    )
    _require(
        any(_computes_map(config, j) for j in range(i)),
        f"layer {i} must have an earlier layer whose attention map it can reuse, but there is none; let layer 0 compute its own",
    )
    source = map_source(config, i)
    heads = [(x.num_heads, x.position_heads) for x in (layer, config.layers[source])]
    _require(
        heads[0] == heads[1],
        f"layer {i} applies the attention map of layer {source}, so it must have the same heads, but has {layer.num_heads} "
        f"(position_heads {layer.position_heads}), and layer {source} has {config.layers[source].num_heads} "
        f"({config.layers[source].position_heads})",
    )


def _computes_map(config: EncoderConfig, layer: int) -> bool:
    return config.layers[layer].attention and not config.layers[layer].reuses_attention


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
