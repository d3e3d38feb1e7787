"""The cost model against the encoder itself: its parameters, and the operations that torch counts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.pos_shape import PosConvShape
from s3distill.gates import (
    MEASURES,
    UNITS,
    GateCounts,
    GateSet,
    GateValues,
    breakdown,
    check_target,
    count_cost,
    count_macs_per_second,
    count_parameters,
    minimum_counts,
    minimum_parameters,
    sparsity,
)

BASE_CONV = parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")
BASE = EncoderConfig(BASE_CONV, 768, uniform_layers(12, 12, 64, 3072))
LARGE = EncoderConfig(
    BASE_CONV, 1024, uniform_layers(2, 16, 64, 4096), extractor_mode="layer_norm", conv_bias=True, layer_norm_first=True
)
DATA2VEC = dataclasses.replace(
    BASE, layers=BASE.layers[:2], extractor_mode="layer_norm", pos_conv_kernel=95, pos_conv_depth=5
)

SMALL = EncoderConfig(
    (ConvLayerConfig(6, 10, 5), ConvLayerConfig(8, 3, 2), ConvLayerConfig(4, 2, 2)),
    16,
    (
        LayerConfig(4, 4, 20),
        LayerConfig(3, 8, 12, ffn=False),
        LayerConfig(0, 4, 0),
        LayerConfig(2, 4, 8, attention=False),
    ),
    pos_conv_kernel=8,
    pos_conv_groups=4,
)
WAVLM = dataclasses.replace(
    SMALL,
    layers=tuple(
        dataclasses.replace(layer, position_heads=heads)
        for layer, heads in zip(SMALL.layers, ((0, 1, 2, 3), (3, 0, 1), (), (1, 2)), strict=True)
    ),
    **{"position_buckets": 20, "position_max_distance": 30, "position_heads": 4},
)
VARIANTS = {
    "post_ln": SMALL,
    "pre_ln": dataclasses.replace(SMALL, layer_norm_first=True),
    "layer_norm_extractor": dataclasses.replace(SMALL, extractor_mode="layer_norm", conv_bias=True),
    "data2vec": dataclasses.replace(SMALL, pos_conv_kernel=19, pos_conv_depth=5),
    "data2vec_wide": dataclasses.replace(SMALL, pos_conv_kernel=24, pos_conv_depth=4),
    "unprojected": dataclasses.replace(SMALL, embed_dim=4, project_features=False),
    "no_layers": dataclasses.replace(SMALL, layers=()),
    "wavlm": WAVLM,
    "wavlm_pre_ln": dataclasses.replace(WAVLM, layer_norm_first=True, extractor_mode="layer_norm"),
}


def num_parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SpeechEncoder(config).parameters())


def cut(config: EncoderConfig, counts: GateCounts) -> EncoderConfig:
    """The config of a pruned model that whole counts describe."""
    conv = tuple(dataclasses.replace(c, channels=int(n)) for c, n in zip(config.conv_layers, counts.conv, strict=True))
    layers = tuple(
        LayerConfig(
            *(int(h), layer.head_dim, int(f)),
            attention=bool(a),
            ffn=bool(p),
            position_heads=None if layer.position_heads is None else layer.position_heads[: int(h)],
        )
        for layer, h, f, a, p in zip(
            config.layers, counts.heads, counts.ffn, counts.attention_layers, counts.ffn_layers, strict=True
        )
    )
    width, groups = tuple(map(int, counts.width)), config.pos_conv_groups
    *hidden, last = (tuple(map(int, counts.pos_conv[i : i + groups])) for i in range(0, len(counts.pos_conv), groups))
    starts = [sum(width[:g]) for g in range(groups)]
    written = tuple(start + i for start, number in zip(starts, last, strict=True) for i in range(number))
    stream = {"embed_dim": sum(width), "pos_conv_shape": PosConvShape(width, tuple(hidden), written)}
    if config.position_buckets > 0:
        stream |= {"position_channels": tuple(range(sum(width))), "position_slice": config.position_slice_width}
    return dataclasses.replace(config, conv_layers=conv, layers=layers, **stream)


@st.composite
def gate_values(draw: st.DrawFn, config: EncoderConfig) -> GateValues:
    """0/1 gates of every unit, at least one conv channel each, in the shapes of a `GateSet`."""
    shapes = GateSet(config, UNITS).deterministic()

    def bits(gate: torch.Tensor | None, low: int = 0, every: int = 10**9) -> torch.Tensor | None:
        if gate is None:
            return None
        values = draw(st.lists(st.sampled_from([0.0, 0.7, 1.0]), min_size=gate.numel(), max_size=gate.numel()))
        values[::every] = [max(value, float(low)) for value in values[::every]]
        return torch.tensor(values).view(gate.shape)

    group = config.embed_dim // config.pos_conv_groups

    return GateValues(
        tuple(bits(g, 1) for g in shapes.conv),
        *(
            tuple(bits(g) for g in unit)
            for unit in (shapes.heads, shapes.ffn, shapes.attention_layers, shapes.ffn_layers)
        ),
        width=bits(shapes.width, 1, group),
        pos_conv=tuple(bits(g, 1, group) for g in shapes.pos_conv),
    )


@pytest.mark.parametrize("config", [BASE, LARGE, DATA2VEC], ids=["base", "large", "data2vec"])
def test_parameters_of_released_shapes(config: EncoderConfig) -> None:
    counted = count_parameters(config, GateCounts.full(config))
    assert isinstance(counted, int) and counted == num_parameters(config)


def test_hubert_base() -> None:
    # 94,370,944 and `mask_emb`; weight_g of the positional conv (128) is counted
    assert count_parameters(BASE, GateCounts.full(BASE)) == 94_371_712
    parts = breakdown(BASE, GateCounts.full(BASE))
    assert parts["conv"] == 512 * 10 + 4 * 512 * 512 * 3 + 2 * 512 * 512 * 2
    assert parts["attention"] == 12 * 4 * (768 * 768 + 768)
    assert parts["ffn"] == 12 * (2 * 768 * 3072 + 3072 + 768)
    assert sum(parts.values()) == 94_371_712


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_of_every_variant(name: str) -> None:
    assert count_parameters(VARIANTS[name], GateCounts.full(VARIANTS[name])) == num_parameters(VARIANTS[name])


@pytest.mark.parametrize("name", ["post_ln", "pre_ln", "layer_norm_extractor", "data2vec", "wavlm", "wavlm_pre_ln"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_cost_at_closed_gates_is_that_of_the_pruned_encoder(name: str, data: st.DataObject) -> None:
    config = VARIANTS[name]
    counts = GateCounts.from_values(config, data.draw(gate_values(config)))
    pruned = cut(config, counts)
    assert count_parameters(config, counts) == num_parameters(pruned)
    assert count_macs_per_second(config, counts) == count_macs_per_second(pruned, GateCounts.full(pruned))


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "no_layers"])
def test_macs_are_what_torch_counts(name: str) -> None:
    config = VARIANTS[name]
    encoder = SpeechEncoder(config).eval().requires_grad_(False)
    # the reference kernel is made of matrix products, which the counter sees
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.randn(1, 4000))
    assert (
        count_macs_per_second(config, GateCounts.full(config), utterance_s=0.25) * 0.25 == counter.get_total_flops() / 2
    )


def test_attention_makes_long_utterances_dearer() -> None:
    full = GateCounts.full(BASE)
    short, long = (float(count_macs_per_second(BASE, full, seconds)) for seconds in (5.0, 30.0))
    frames = [BASE.num_frames(seconds * 16_000) / seconds * BASE.num_frames(seconds * 16_000) for seconds in (5, 30)]
    assert long - short == pytest.approx(12 * 2 * 768 * (frames[1] - frames[0]), rel=0.02)
    assert float(count_macs_per_second(BASE, full)) == sum(breakdown(BASE, full, "macs").values())
    conv = breakdown(BASE, full, "macs")["conv"] / float(count_macs_per_second(BASE, full))
    assert 0.30 < conv < 0.36  # 4.5% of the parameters, a third of the MACs


def test_expected_cost_agrees_with_samples() -> None:
    """Products of expectations are the expectation of the product: gates of different vectors are independent.

    Not those of the stream in the positional convolution, which reads and writes it.
    """
    gates = GateSet(SMALL, [unit for unit in UNITS if unit != "width"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(-0.5 + torch.randn(parameter.shape, generator=generator))
    with torch.no_grad():
        expected = gates.expected_counts()
        draws = [GateCounts.from_values(SMALL, gates.sample(seed)) for seed in range(800)]
    for measure in MEASURES:
        values = torch.tensor([float(count_cost(SMALL, counts, measure)) for counts in draws], dtype=torch.float64)
        error = values.std().item() / math.sqrt(len(draws))
        assert abs(values.mean().item() - float(count_cost(SMALL, expected, measure))) < 4 * error


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("name", ["post_ln", "pre_ln", "wavlm"])
def test_gradient(name: str, measure: str) -> None:
    config = VARIANTS[name]
    full = GateCounts.full(config)
    sizes = [len(unit) for unit in full.as_dict().values()]
    point = torch.tensor([float(c) * 0.7 for unit in full.as_dict().values() for c in unit], dtype=torch.float64)

    def cost(x: torch.Tensor) -> torch.Tensor:
        units = [tuple(part.unbind()) for part in x.split(sizes)]
        return sparsity(config, GateCounts(*units), measure)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(cost, point.requires_grad_())


def test_pre_ln_norms_go_with_their_sub_layer() -> None:
    def norms(config: EncoderConfig, there: int) -> float:
        full = GateCounts.full(config)
        return breakdown(config, dataclasses.replace(full, attention_layers=(there,) * 4))["norms"]

    assert norms(VARIANTS["pre_ln"], 1) - norms(VARIANTS["pre_ln"], 0) == 4 * 2 * 16
    assert norms(SMALL, 1) == norms(SMALL, 0)


def test_sparsity_against_a_reference() -> None:
    full = GateCounts.full(SMALL)
    size = int(count_parameters(SMALL, full))
    assert sparsity(SMALL, full) == 0
    assert sparsity(SMALL, full, reference=2 * size) == 0.5
    assert sparsity(SMALL, minimum_counts(SMALL, UNITS)) == 1 - minimum_parameters(SMALL, UNITS) / size


def test_minimum_is_the_encoder_with_every_gate_closed() -> None:
    for config in VARIANTS.values():
        assert minimum_parameters(config, UNITS) == num_parameters(cut(config, minimum_counts(config, UNITS)))
    assert minimum_parameters(SMALL, ["head"]) > minimum_parameters(SMALL, ["head", "ffn"])
    assert minimum_counts(SMALL, ["conv"]).conv == (1, 1, 1)
    assert minimum_counts(VARIANTS["unprojected"], ["conv"]).conv == (1, 1, 4)


def test_targets() -> None:
    check_target(BASE, ("conv", "head", "ffn"), 0.75)
    check_target(BASE, ("conv", "head", "ffn"), 0.75, "macs")
    check_target(BASE, ("conv",), 0.0)
    limit = 1 - minimum_parameters(BASE, ["head"]) / count_parameters(BASE, GateCounts.full(BASE))
    message = (
        r"target sparsity of 0.75 in params cannot be reached by pruning head: .* it is 0\.300; lower the target or add"
    )
    assert math.floor(limit * 1000) == 300
    with pytest.raises(ValueError, match=message):
        check_target(BASE, ["head"], 0.75)
    check_target(BASE, ["head"], 0.300)
    check_target(BASE, ["head"], 0.92, reference=1e9)
    with pytest.raises(
        ValueError, match=r"0\.75 in params cannot be reached: with every gate open it is already 0\.906"
    ):
        check_target(BASE, ["head"], 0.75, reference=1e9)
    for target in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\), but is"):
            check_target(BASE, ["head"], target)


def test_errors() -> None:
    with pytest.raises(ValueError, match="one of params, macs, but is 'flops'"):
        count_cost(BASE, None, "flops")
    with pytest.raises(ValueError, match=r"at least one frame \(0.025 s\), but is 0.01"):
        count_macs_per_second(BASE, GateCounts.full(BASE), utterance_s=0.01)
