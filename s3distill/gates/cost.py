"""What an encoder costs in parameters and MACs, as a differentiable function of the structures that are open.

Training (size constraint), `inspect` and the report share it. Whole numbers give exact
whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from s3distill.encoder.config import SAMPLE_RATE, EncoderConfig
from s3distill.encoder.variants import owner
from s3distill.gates.counts import UNITS, Count, GateCounts, check_units, prunable_sizes, structure_sizes
from s3distill.gates.output_cost import output_macs, output_parameters
from s3distill.gates.variant_cost import attention_macs, attention_parameters, conv_cost

MEASURES = ("params", "macs")

UTTERANCE_S = 10.0  # seconds; attention's MACs per second of audio grow with the length of the utterance


def check_measure(measure: str) -> None:
    """Raises ValueError where ``measure`` is none of `MEASURES`."""
    if measure not in MEASURES:
        raise ValueError(f"the measure of size must be one of {', '.join(MEASURES)}, but is {measure!r}")


def parameter_breakdown(config: EncoderConfig, counts: GateCounts) -> dict[str, Count]:
    """Parameters of each part of the encoder; the parts add up to `count_parameters`.

    With c_i open channels of conv layer i, h heads of width e, f FFN dims, residual width d, and p_a, p_f for the
    sub-layers:

        conv        sum_i c_{i-1} c_i k_i (+ c_i with `conv_bias`), c_{-1} = 1
        projection  (c_last + 1) d
        attention   p_a (3 (d + 1) h e + (h e + 1) d)
        ffn         p_f ((d + 1) f + (f + 1) d)

    A WavLM with n buckets and H heads before pruning adds n H for its position bias, which is never cut, and to each
    attention p_a (h + 8 (d / H + 1)) for the gate of the bias. A time reduction by r adds r d^2 + d. What layers share is
    counted once, with its owner. Separable convolutions and other kinds of attention: see `variant_cost`.

    Products of expectations are the expectations of the products, since gates are independent of each other. A post-LN
    layer keeps both LayerNorms (4 d) without its sub-layers, in a pre-LN layer each goes with its sub-layer.
    """
    dim = config.embed_dim
    conv: Count = 0
    norms: Count = 2 * dim + 2 * counts.conv[-1]  # encoder.layer_norm and layer_norm
    channels_in: Count = 1
    for i, (shape, channels) in enumerate(zip(config.conv_layers, counts.conv, strict=True)):
        conv = conv + conv_cost(shape, channels_in, channels) + (channels if config.conv_bias else 0)
        if i == 0 or config.extractor_mode == "layer_norm":
            norms = norms + 2 * channels
        channels_in = channels
    attention: Count = 0
    ffn: Count = 0
    for i in range(config.num_layers):
        has_attention, has_ffn = counts.attention_layers[i], counts.ffn_layers[i]
        if owner(config, "attention", i) == i:
            for term in attention_parameters(config, i, counts.heads[i]):
                attention = attention + has_attention * term
        if owner(config, "ffn", i) == i:
            ffn = ffn + has_ffn * ((dim + 1) * counts.ffn[i] + (counts.ffn[i] + 1) * dim)
        if owner(config, "norms", i) == i:
            norms = norms + (2 * dim * (has_attention + has_ffn) if config.layer_norm_first else 4 * dim)
    kept_heads = {} if config.output is None else {"output_heads": output_parameters(config.output)}
    depth, kernel = config.pos_conv_depth, pos_conv_kernel(config)
    pos_conv = depth * (dim * (dim // config.pos_conv_groups) * kernel + dim)
    return {
        "conv": conv,
        "projection": (channels_in + 1) * dim if config.project_features else 0,
        "mask_emb": dim,
        "pos_conv": pos_conv + (kernel if depth == 1 else 0),  # weight_g [1, 1, K] of the weight norm
        "time_reduction": config.time_reduction * dim * dim + dim if config.time_reduction > 1 else 0,
        "position_bias": config.position_buckets * config.position_heads,
        "attention": attention,
        "ffn": ffn,
        "norms": norms,
        **kept_heads,
    }


def count_parameters(config: EncoderConfig, counts: GateCounts) -> Count:
    """Parameters of a `SpeechEncoder` (`mask_emb` included, heads and gates not) with these structures open.

    Returns:
        int for whole counts, else [] float64, differentiable.
    """
    return _total(parameter_breakdown(config, counts))


def mac_breakdown(config: EncoderConfig, counts: GateCounts, utterance_s: float = UTTERANCE_S) -> dict[str, Count]:
    """Multiply-accumulates of one utterance, by part.

    With T_i frames behind conv layer i and T = T_last: conv sum_i c_{i-1} c_i k_i T_i, projection c_last d T,
    positional conv depth * d (d / groups) k T, attention p_a (4 d h e T + 2 h e T^2) and, for the gate of WavLM's position
    bias, p_a 8 h (d / H) T, FFN p_f 2 d f T. Norms, biases, activations and gates, which are linear in the width, and
    the position bias, which is looked up and added to the scores, are not counted. The positional conv with an even kernel makes
    one frame more than it keeps. A time reduction takes d^2 T MACs and leaves T / r frames to the layers behind it; each
    use of shared parameters counts. Separable convolutions and other kinds of attention: see `variant_cost`.

    Args:
        utterance_s: length of the utterance in seconds.
    Raises:
        ValueError: the utterance is shorter than one frame.
    """
    frames = round(utterance_s * SAMPLE_RATE)
    if frames < config.receptive_field:
        raise ValueError(
            f"`utterance_s` must be at least one frame ({config.receptive_field / SAMPLE_RATE:g} s), but is "
            f"{utterance_s}; {UTTERANCE_S:g} is the default"
        )
    dim = config.embed_dim
    conv: Count = 0
    channels_in: Count = 1
    for shape, channels in zip(config.conv_layers, counts.conv, strict=True):
        frames = (frames - shape.kernel) // shape.stride + 1
        conv = conv + conv_cost(shape, channels_in, channels, frames)
        channels_in = channels
    kernel = pos_conv_kernel(config)
    parts: dict[str, Count] = {
        "conv": conv,
        "projection": channels_in * (dim * frames) if config.project_features else 0,
        "pos_conv": config.pos_conv_depth * dim * (dim // config.pos_conv_groups) * kernel * (frames + 1 - kernel % 2),
    }
    frames = frames // config.time_reduction
    parts["time_reduction"] = config.time_reduction * dim * dim * frames if config.time_reduction > 1 else 0
    parts["attention"] = parts["ffn"] = 0
    for i in range(config.num_layers):
        for structures, macs in attention_macs(config, i, counts.heads[i], frames):
            parts["attention"] = parts["attention"] + counts.attention_layers[i] * structures * macs
        parts["ffn"] = parts["ffn"] + counts.ffn_layers[i] * counts.ffn[i] * (2 * dim * frames)
    if config.output is not None:
        parts["output_heads"] = output_macs(config.output) * frames
    return parts


def count_macs_per_second(config: EncoderConfig, counts: GateCounts, utterance_s: float = UTTERANCE_S) -> Count:
    """Multiply-accumulates per second of 16 kHz audio in an utterance of ``utterance_s`` seconds, see `mac_breakdown`.

    Returns:
        float for whole counts, else [] float64, differentiable.
    """
    return _total(mac_breakdown(config, counts, utterance_s)) / utterance_s


def breakdown(config: EncoderConfig, counts: GateCounts, measure: str = "params") -> dict[str, float]:
    """Cost of each part as plain numbers: parameters, or MACs per second of audio."""
    check_measure(measure)
    parts = parameter_breakdown(config, counts) if measure == "params" else mac_breakdown(config, counts)
    per = 1.0 if measure == "params" else UTTERANCE_S
    return {name: float(part) / per for name, part in parts.items()}


def count_cost(config: EncoderConfig, counts: GateCounts | None, measure: str) -> Count:
    """`count_parameters` or `count_macs_per_second`, by the names of `MEASURES`; ``counts`` None = nothing pruned."""
    check_measure(measure)
    counts = GateCounts.full(config) if counts is None else counts
    return count_parameters(config, counts) if measure == "params" else count_macs_per_second(config, counts)


def pos_conv_kernel(config: EncoderConfig) -> int:
    """Kernel of each positional conv: K, or max(3, K // depth) in data2vec's stack."""
    depth = config.pos_conv_depth
    return config.pos_conv_kernel if depth == 1 else max(3, config.pos_conv_kernel // depth)


def _total(parts: dict[str, Count]) -> Count:
    total: Count = 0
    for part in parts.values():
        total = total + part
    return total


def sparsity(
    config: EncoderConfig, counts: GateCounts, measure: str = "params", reference: float | None = None
) -> Count:
    """Fraction removed, s = 1 - cost(counts) / reference.

    Args:
        config: shape of the student before pruning.
        measure: ``params`` or ``macs``.
        reference: cost that counts as 0 sparsity, None = that of ``config``. Give the teacher's for a smaller student.
    Returns:
        float for whole counts, else [] float64, differentiable.
    """
    reference = reference or float(count_cost(config, None, measure))
    return 1 - count_cost(config, counts, measure) / reference


def minimum_counts(config: EncoderConfig, units: Sequence[str]) -> GateCounts:
    """What stays if every gate of ``units`` closes: one channel per gated conv layer, nothing of the others."""
    check_units(units)
    counts = structure_sizes(config)
    for unit in units:
        floor = 1 if unit == "conv" else 0
        counts[unit] = tuple(
            floor if gated else size for size, gated in zip(counts[unit], prunable_sizes(config)[unit], strict=True)
        )
    return GateCounts(*(counts[unit] for unit in UNITS))


def minimum_parameters(config: EncoderConfig, units: Sequence[str]) -> int:
    """Parameters that stay if every gate of ``units`` closes."""
    return int(count_parameters(config, minimum_counts(config, units)))


def check_target(
    config: EncoderConfig,
    units: Sequence[str],
    target: float,
    measure: str = "params",
    reference: float | None = None,
) -> None:
    """Refuses a target sparsity that no setting of the gates reaches.

    Args:
        target: fraction of the cost to remove, in [0, 1).
        measure, reference: as in `sparsity`.
    Raises:
        ValueError: ``target`` is out of range, above what ``units`` can remove, or below what is missing with every gate open; the
            message names that limit.
    """
    if not 0 <= target < 1:
        raise ValueError(f"the target sparsity must be in [0, 1), but is {target}; 0.75 removes three quarters")
    limit = float(sparsity(config, minimum_counts(config, units), measure, reference))
    if target > limit:
        # rounded down, so that the number in the message can be typed in
        raise ValueError(
            f"a target sparsity of {target:g} in {measure} cannot be reached by pruning {', '.join(units)}: with every "
            f"one of their gates closed it is {math.floor(limit * 1000) / 1000:.3f}; lower the target or add units of "
            f"{', '.join(UNITS)}"
        )
    least = float(sparsity(config, GateCounts.full(config), measure, reference))
    if target < least:
        # rounded up, for the same reason
        raise ValueError(
            f"a target sparsity of {target:g} in {measure} cannot be reached: with every gate open it is already "
            f"{math.ceil(least * 1000) / 1000:.3f}, since the student is smaller than what sparsity refers to; raise the target"
        )
