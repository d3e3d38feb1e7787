"""What the parts of the encoder that have variants cost: convolutions of the extractor, and attention. `cost` adds them up."""

from __future__ import annotations

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig
from s3distill.encoder.efficient_attention import num_pairs
from s3distill.gates.counts import Count


def conv_cost(shape: ConvLayerConfig, channels_in: Count, channels: Count, frames: int = 1) -> Count:
    """Weights of a conv layer, c_in c k, or c_in k + c_in c where it is separable; times the frames that come out: its MACs."""
    if shape.separable:
        return channels_in * (shape.kernel * frames) + channels_in * channels * frames
    return channels_in * channels * (shape.kernel * frames)


def attention_parameters(config: EncoderConfig, layer: int, heads: Count) -> tuple[Count, ...]:
    """Parameters of one attention sub-layer with so many heads, its LayerNorm left out, as terms of a sum.

    With inner width i = h e: 3 (d + 1) i + (i + 1) d, of a reused map (d + 1) i + (i + 1) d; WavLM's gate h + 8 (d / H + 1)
    where the layer computes a map; Linformer's E and F 2 k n.
    """
    dim, shape = config.embed_dim, config.layers[layer]
    inner = heads * shape.head_dim
    if shape.reuses_attention:
        return ((dim + 1) * inner + (inner + 1) * dim,)
    projections = 3 * (dim + 1) * inner + (inner + 1) * dim
    if config.position_buckets > 0:
        return projections, heads + 8 * (dim // config.position_heads + 1)
    if config.attention == "linformer":
        return projections, 2 * config.linformer_dim * config.linformer_max_frames
    return (projections,)


def attention_macs(config: EncoderConfig, layer: int, heads: Count, frames: int) -> tuple[tuple[Count, int], ...]:
    """Multiply-accumulates of one attention sub-layer with so many heads over T frames, as factors of a sum of products.

    With inner width i = h e and P pairs of query and key (T^2; see `num_pairs` for windows): 4 d i T + 2 i P. A reused map
    leaves 2 d i T + i T^2. Linformer: 4 d i T + 4 k i T. The gate of WavLM's position bias: 8 h (d / H) T.
    """
    dim, shape = config.embed_dim, config.layers[layer]
    inner = heads * shape.head_dim
    if shape.reuses_attention:
        return ((inner, 2 * dim * frames + frames * frames),)
    if config.attention == "linformer":
        return ((inner, 4 * dim * frames + 4 * config.linformer_dim * frames),)
    if config.attention == "windowed":
        pairs = num_pairs(frames, config.attention_window, config.attention_global)
        return ((inner, 4 * dim * frames + 2 * pairs),)
    projections_and_pairs = (inner, 4 * dim * frames + 2 * frames * frames)
    if config.position_buckets > 0:
        return projections_and_pairs, (heads, 8 * (dim // config.position_heads) * frames)
    return (projections_and_pairs,)
