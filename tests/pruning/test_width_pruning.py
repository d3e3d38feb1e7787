"""Gates on the residual stream and on the positional convolution: pruned is what was masked, in every family and combination."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import config_from_options, options_from_config
from s3distill.encoder.pos_shape import pos_conv_outputs
from s3distill.gates import UNITS, GateCounts, GateSet, count_macs_per_second, count_parameters
from s3distill.gates.values import GateValues
from s3distill.heads import HeadsConfig, TeacherHeads
from s3distill.masks.masked_model import _adopt
from s3distill.pruning import compare, plan_from_gates
from s3distill.pruning.plan import Kept
from s3distill.pruning.width import cut_heads
from tests.pruning.test_pruning import make_config, make_encoder, padded_batch, prune, soft_gates

# a stream of 48 channels: a LayerNorm over the handful that stays of 24 may meet frames with next to no variance, where it
# magnifies what float32 rounds (in float64 the error is 1e-14 in either)
CONV = parse_conv_layers("[(32, 10, 5)] + [(28, 3, 2)] * 2 + [(30, 2, 2)]")
WAVLM = {"position_buckets": 20, "position_max_distance": 60, "position_heads": 4}
BIASED = uniform_layers(4, 4, 12, 40, position_bias=True)


def wide(mode: str = "default", pre_ln: bool = False, depth: int = 1, **options: Any) -> EncoderConfig:
    values = {"conv_layers": CONV, "embed_dim": 48, "layers": uniform_layers(4, 4, 12, 40), **options}
    return dataclasses.replace(make_config(mode, pre_ln, depth), **values)


STREAM = {"embed_dim": 30, "project_features": False, "pos_conv_groups": 2}
FAMILIES = {
    "wav2vec2_base": wide(),
    "wav2vec2_large": wide("layer_norm", True),
    "post_ln_layer_norm_extractor": wide("layer_norm"),
    "even_kernel": wide(pos_conv_kernel=8),
    "data2vec": wide("layer_norm", depth=3),
    "data2vec_pre_ln_even_kernel": wide("layer_norm", True, 3, pos_conv_kernel=12),
    "wavlm_base": wide(layers=BIASED, **WAVLM),
    "wavlm_large": wide("layer_norm", True, layers=BIASED, **WAVLM),
    "unprojected": wide(**STREAM),
    "unprojected_large": wide("layer_norm", True, 2, **STREAM),
    "one_group": wide(pos_conv_groups=1),
}


def stream_gates(config: EncoderConfig, seed: int = 0, width: bool = True, pos_conv: bool = True) -> GateValues:
    """Half closed, the rest soft, but one channel of each group open; the other units' gates are open."""
    generator = torch.Generator().manual_seed(seed)

    def draw(sizes: tuple[int, ...]) -> torch.Tensor:
        parts = []
        for size in sizes:
            values = 0.3 + 0.7 * torch.rand(size, generator=generator)
            closed = torch.rand(size, generator=generator) < 0.5
            closed[int(torch.randint(size, (), generator=generator))] = False
            parts.append(values.masked_fill(closed, 0.0))
        return torch.cat(parts)

    outputs = pos_conv_outputs(config)
    drawn = draw(outputs[0]), tuple(draw(sizes) for sizes in outputs)
    return dataclasses.replace(
        GateValues.open(config),
        width=drawn[0] if width else None,
        pos_conv=drawn[1] if pos_conv else (None,) * len(outputs),
    )


def all_gates(config: EncoderConfig) -> GateValues:
    stream = stream_gates(config)
    gates = dataclasses.replace(soft_gates(config), width=stream.width, pos_conv=stream.pos_conv)
    return gates if config.project_features else dataclasses.replace(gates, conv=(*gates.conv[:-1], None))


def num_parameters(encoder: SpeechEncoder) -> int:
    return sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("units", ["width", "pos_conv", "width+pos_conv", "all"])
def test_pruned_equals_masked_and_costs_what_was_counted(family: str, units: str) -> None:
    encoder = make_encoder(FAMILIES[family])
    some = stream_gates(encoder.config, 0, "width" in units, "pos_conv" in units)
    gates = all_gates(encoder.config) if units == "all" else some
    compact = prune(encoder, gates)
    result = compare(encoder, gates, compact, *padded_batch())
    assert result.relative_error <= 1e-5, result

    counts = GateCounts.from_values(encoder.config, gates)
    assert count_parameters(encoder.config, counts) == num_parameters(compact)
    assert counts == GateCounts.full(compact.config)
    assert count_macs_per_second(encoder.config, counts) == count_macs_per_second(compact.config, counts)
    assert num_parameters(compact) < num_parameters(encoder)
    assert EncoderConfig.from_json(compact.config.to_json()) == compact.config
    options = options_from_config(compact.config, "wavlm" if encoder.config.position_buckets else "wav2vec2", False)
    assert config_from_options(options, options["_name"]) == compact.config


@pytest.mark.parametrize("family", ["wav2vec2_base", "data2vec", "wavlm_large"])
def test_a_cut_encoder_builds_on_the_meta_device(family: str) -> None:
    """As the backbone of a mask bank does: what no checkpoint holds is filled in."""
    encoder = make_encoder(FAMILIES[family])
    compact = prune(encoder, all_gates(encoder.config))
    adopted = _adopt(compact.config, dict(compact.named_parameters()), "the cut encoder")
    source, padding_mask = padded_batch()
    with torch.no_grad():
        assert torch.equal(adopted(source, padding_mask).x, compact(source, padding_mask).x)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_channels_are_zero_in_every_hidden_state(family: str) -> None:
    encoder = make_encoder(FAMILIES[family])
    gates = all_gates(encoder.config)
    assert gates.width is not None
    closed = gates.width == 0
    source, padding_mask = padded_batch()
    masked = torch.rand(3, int(encoder.config.num_frames(4000)), generator=torch.Generator().manual_seed(2)) < 0.3
    with torch.no_grad():
        out = encoder(source, padding_mask, gates=gates, masked=masked)
    for state in [*out.hidden_states, out.x]:
        assert (state[..., closed] == 0).all() and state[..., ~closed].abs().max() > 1e-2
    for i, ffn_output in enumerate(out.ffn_outputs):
        assert (ffn_output[..., closed] == 0).all() and bool((ffn_output != 0).any()) is (i != 2), "layer 2 has no FFN"


@pytest.mark.parametrize("family", ["wav2vec2_base", "data2vec", "wavlm_large", "unprojected"])
def test_masked_frames_are_the_same(family: str) -> None:
    encoder = make_encoder(FAMILIES[family])
    gates = all_gates(encoder.config)
    compact = prune(encoder, gates)
    source, padding_mask = padded_batch()
    masked = torch.rand(3, int(encoder.config.num_frames(4000)), generator=torch.Generator().manual_seed(2)) < 0.3
    with torch.no_grad():
        expected = encoder(source, padding_mask, gates=gates, masked=masked)
        got = compact(source, padding_mask, masked=masked)
        other = compact(source, padding_mask)
    valid = ~expected.padding_mask
    expected_x = expected.x[..., gates.width > 0][valid]
    assert (got.x[valid] - expected_x).abs().max() <= 1e-5 * expected_x.abs().max()
    assert (got.x[valid] - other.x[valid]).abs().max() > 1e-2, "the mask embedding must be heard"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_of_a_cut_encoder_is_its_single_utterances(family: str) -> None:
    encoder = make_encoder(FAMILIES[family])
    compact = prune(encoder, all_gates(encoder.config))
    source, padding_mask = padded_batch()
    with torch.no_grad():
        batch = compact(source, padding_mask).x
        for i, length in enumerate((~padding_mask).sum(-1).tolist()):
            single = compact(source[i : i + 1, :length]).x[0]
            torch.testing.assert_close(batch[i, : len(single)], single, rtol=0, atol=2e-5 * float(single.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_units_move_the_output(family: str) -> None:
    encoder = make_encoder(FAMILIES[family])
    source, padding_mask = padded_batch()
    with torch.no_grad():
        dense = encoder(source, padding_mask).x
        for units in ((True, False), (False, True)):
            gated = encoder(source, padding_mask, gates=stream_gates(encoder.config, 0, *units)).x
            assert (gated - dense).abs().max() / dense.abs().max() > 1e-2, units
        ones = torch.ones(encoder.config.embed_dim)
        open_gates = dataclasses.replace(
            stream_gates(encoder.config), width=ones, pos_conv=(ones,) * encoder.config.pos_conv_depth
        )
        torch.testing.assert_close(encoder(source, padding_mask, gates=open_gates).x, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_encoder_is_cut_again(family: str) -> None:
    first = make_encoder(FAMILIES[family])
    second = prune(first, all_gates(first.config))
    torch.manual_seed(3)
    gates = GateSet(second.config, UNITS)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(2 * torch.randn(gate.num_gates))
    values = gates.deterministic()
    third = prune(second, values)
    result = compare(second, values, third, *padded_batch())
    assert result.relative_error <= 1e-5, result
    assert gates.kept_counts() == GateCounts.from_values(second.config, values) == GateCounts.full(third.config)
    assert count_parameters(second.config, gates.kept_counts()) == num_parameters(third) < num_parameters(second)
    if second.config.position_channels is not None:
        assert set(third.config.position_channels) < set(second.config.position_channels)
        assert third.config.position_slice == 12


def test_equal_groups_stay_an_ordinary_convolution() -> None:
    encoder = make_encoder(make_config())
    width = torch.tensor([0.0, 1, 0.5, 0, 1, 1] * 4)
    gates = dataclasses.replace(GateValues.open(encoder.config), width=width)
    compact = prune(encoder, gates)
    assert compact.config.pos_conv_shape is None and compact.config.embed_dim == 16
    assert compact.get_parameter("encoder.pos_conv.0.weight_v").shape == (16, 4, 9)
    assert compare(encoder, gates, compact, *padded_batch()).holds


def test_without_these_units_nothing_of_the_stream_is_touched() -> None:
    encoder = make_encoder(make_config())
    compact = dict(prune(encoder, soft_gates(encoder.config)).named_parameters())
    for name, value in encoder.named_parameters():
        if name.startswith(("encoder.pos_conv.", "encoder.layer_norm.", "mask_emb")):
            assert torch.equal(compact[name], value), name


@pytest.mark.parametrize("family", ["wav2vec2_base", "wav2vec2_large", "data2vec"])
def test_a_positional_convolution_may_go_altogether(family: str) -> None:
    """Outputs and channels of the stream close in such a way that none of the last convolution's outputs is left."""
    encoder = make_encoder(FAMILIES[family])
    gates = stream_gates(encoder.config)
    width = torch.tensor([1.0, 0, 0.5, 0, 1, 0] * 8)
    gates = dataclasses.replace(gates, width=width, pos_conv=(*gates.pos_conv[:-1], 0.7 * (width == 0)))
    compact = prune(encoder, gates)
    assert compare(encoder, gates, compact, *padded_batch()).holds
    assert not [name for name, _ in compact.named_parameters() if "pos_conv" in name]
    counts = GateCounts.from_values(encoder.config, gates)
    assert count_parameters(compact.config, GateCounts.full(compact.config)) == num_parameters(compact)
    if encoder.config.pos_conv_depth == 1:
        assert count_parameters(encoder.config, counts) == num_parameters(compact)
    assert EncoderConfig.from_json(compact.config.to_json()) == compact.config


def test_a_kernel_position_without_weight_stays_without() -> None:
    encoder = make_encoder(make_config())
    with torch.no_grad():
        encoder.get_parameter("encoder.pos_conv.0.weight_g")[..., 2] = 0
    gates = stream_gates(encoder.config)
    compact = prune(encoder, gates)
    assert compare(encoder, gates, compact, *padded_batch()).holds
    compact(*padded_batch()).x.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in compact.parameters())


@pytest.mark.parametrize(("mode", "sharing"), [("layer2layer", "shared"), ("layer2layer", "own"), ("predlayer", "own")])
def test_heads_predict_the_same_before_and_after(mode: str, sharing: str) -> None:
    encoder = make_encoder(FAMILIES["wav2vec2_large"])
    gates = stream_gates(encoder.config)
    compact = prune(encoder, gates)
    torch.manual_seed(4)
    configs = [
        HeadsConfig(((0, 0), (2, 4), (4, 8)), 48, dim, 4, mode=mode, sharing=sharing, init="default")
        for dim in (48, 32)
    ]
    heads = TeacherHeads(configs)
    width = plan_from_gates(encoder.config, gates).width
    inner = 48 if mode == "predlayer" else 0
    cut_configs = [dataclasses.replace(c, student_dim=len(width), hidden_dim=inner) for c in configs]
    cut = TeacherHeads(cut_configs)
    assert cut.load_matching(cut_heads(heads.state_dict(), width))
    prefixed = cut_heads({f"heads.{name}": value for name, value in heads.state_dict().items()}, width)
    assert all(torch.equal(prefixed[f"heads.{name}"], value) for name, value in cut.state_dict().items())
    with torch.no_grad():
        before, after = encoder(padded_batch()[0], gates=gates), compact(padded_batch()[0])
        pairs = zip(
            [*heads(before.hidden_states), *itertools.chain(*heads.predict_others(before.hidden_states))],
            [*cut(after.hidden_states), *itertools.chain(*cut.predict_others(after.hidden_states))],
            strict=True,
        )
        for expected, got in pairs:
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_losing_everything_is_refused() -> None:
    config = FAMILIES["data2vec"]
    with pytest.raises(ValueError, match="the residual stream would lose all of its 48 channels"):
        plan_from_gates(config, dataclasses.replace(GateValues.open(config), width=torch.zeros(48)))
    starved = torch.ones(48)
    starved[12:24] = 0
    with pytest.raises(ValueError, match=r"groups \[1\] of positional convolution 1 would lose all of their inputs"):
        plan_from_gates(config, dataclasses.replace(GateValues.open(config), pos_conv=(starved, None, None)))


def test_kept_is_what_the_gates_keep() -> None:
    config = FAMILIES["wav2vec2_base"]
    gates = stream_gates(config)
    plan = plan_from_gates(config, gates)
    assert gates.width is not None and gates.pos_conv[0] is not None
    assert torch.equal(plan.width.indices, torch.nonzero(gates.width).flatten())
    assert isinstance(plan.pos_conv[0], Kept)
    assert torch.equal(plan.pos_conv[0].scale, (gates.width * gates.pos_conv[0])[plan.pos_conv[0].indices])
