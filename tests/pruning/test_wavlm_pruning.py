"""A pruned WavLM keeps its position bias: the columns of its own heads, layer 0 included, pruned once and twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.config import EncoderConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import GateCounts, GateSet, count_macs_per_second, count_parameters
from s3distill.gates.values import GateValues
from s3distill.pruning import compare
from s3distill.pruning.compact import prune_student
from tests.pruning.test_pruning import UNITS, make_config, make_encoder, padded_batch, prune, soft_gates

TABLE = "encoder.relative_attention_bias.weight"
SHAPES = [pytest.param("default", False, id="post_ln"), pytest.param("layer_norm", True, id="pre_ln")]


def make_wavlm(mode: str = "default", pre_ln: bool = False) -> SpeechEncoder:
    """Four heads of a slice of 6 channels each, with a bias that counts: 24 wide, 4 layers, 20 buckets."""
    config = dataclasses.replace(
        make_config(mode, pre_ln),
        layers=uniform_layers(4, 4, 6, 20, position_bias=True),
        **{"position_buckets": 20, "position_max_distance": 60, "position_heads": 4},
    )
    encoder = make_encoder(config)
    with torch.no_grad():
        encoder.get_parameter(TABLE).normal_(std=2, generator=torch.Generator().manual_seed(5))
    return encoder


def heads_open(config: EncoderConfig, heads: list[list[float]]) -> GateValues:
    return dataclasses.replace(GateValues.open(config), heads=tuple(map(torch.tensor, heads)))


@pytest.mark.parametrize(("mode", "pre_ln"), SHAPES)
def test_pruned_equals_masked_in_every_unit(mode: str, pre_ln: bool) -> None:
    encoder = make_wavlm(mode, pre_ln)
    gates = soft_gates(encoder.config)  # layer 1 without attention, layer 3 without heads
    compact = prune(encoder, gates)
    assert compare(encoder, gates, compact, *padded_batch()).relative_error <= 1e-5
    for layer, gate in zip(compact.config.layers, gates.heads, strict=True):
        if layer.attention and gate is not None:
            assert layer.position_heads == tuple(torch.nonzero(gate).flatten().tolist())
    assert compact.config.layers[1].position_heads == compact.config.layers[3].position_heads == ()


@pytest.mark.parametrize(("mode", "pre_ln"), SHAPES)
def test_each_layer_keeps_other_heads(mode: str, pre_ln: bool) -> None:
    encoder = make_wavlm(mode, pre_ln)
    gates = heads_open(encoder.config, [[0, 0, 0.7, 1], [1, 0, 0, 0], [0, 0.4, 0, 1], [1, 1, 1, 1]])
    compact = prune(encoder, gates)
    assert [layer.position_heads for layer in compact.config.layers] == [(2, 3), (0,), (1, 3), (0, 1, 2, 3)]
    assert compare(encoder, gates, compact, *padded_batch()).relative_error <= 1e-5
    grep_a = encoder.get_parameter("encoder.layers.2.self_attn.grep_a")
    assert torch.equal(compact.get_parameter("encoder.layers.2.self_attn.grep_a"), grep_a[:, [1, 3]])
    assert compact.get_parameter(TABLE).shape == (20, 4)

    # the heads that stay are what the equality rests on: with other columns of the same number it is gone
    layers = list(compact.config.layers)
    layers[0] = dataclasses.replace(layers[0], position_heads=(0, 1))
    shifted = SpeechEncoder(dataclasses.replace(compact.config, layers=tuple(layers))).eval()
    shifted.load_encoder_state(dict(compact.named_parameters()))
    assert compare(encoder, gates, shifted, *padded_batch()).relative_error > 1e-3


@pytest.mark.parametrize(("mode", "pre_ln"), SHAPES)
@pytest.mark.parametrize("removed", [(0,), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_attention_of_layer_0_may_go(mode: str, pre_ln: bool, removed: tuple[int, ...]) -> None:
    encoder = make_wavlm(mode, pre_ln)
    there = tuple(torch.tensor(0.0 if i in removed else 0.8) for i in range(4))
    gates = dataclasses.replace(GateValues.open(encoder.config), attention_layers=there)
    compact = prune(encoder, gates)
    assert compare(encoder, gates, compact, *padded_batch()).relative_error <= 1e-5
    names = dict(compact.named_parameters())
    assert TABLE in names and not any(name.startswith("encoder.layers.0.self_attn.") for name in names)
    if removed == (0, 1, 2, 3):
        return
    with torch.no_grad():  # the layers that are left still hear the bias
        before = compact(*padded_batch()).x
        compact.get_parameter(TABLE).zero_()
        assert (compact(*padded_batch()).x - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize(("mode", "pre_ln"), SHAPES)
def test_pruned_again(mode: str, pre_ln: bool) -> None:
    first = make_wavlm(mode, pre_ln)
    second = prune(first, heads_open(first.config, [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]]))
    gates = heads_open(second.config, [[0, 0.5, 1], [1, 0, 0.3], [0, 0, 1], [0.6, 0]])
    third = prune(second, gates)
    assert [layer.position_heads for layer in third.config.layers] == [(2, 3), (0, 3), (2,), (2,)]
    assert compare(second, gates, third, *padded_batch()).relative_error <= 1e-5

    everything = GateSet(third.config, UNITS)
    with torch.no_grad():
        for _, _, gate in everything.all_gates():
            gate.log_alpha.copy_(torch.linspace(-6, 6, gate.num_gates))
    fourth = prune(third, everything.deterministic())
    assert compare(third, everything.deterministic(), fourth, *padded_batch()).relative_error <= 1e-5
    assert fourth.config.position_heads == 4


@pytest.mark.parametrize(("mode", "pre_ln"), SHAPES)
def test_the_cost_is_that_of_the_pruned_encoder(mode: str, pre_ln: bool) -> None:
    encoder = make_wavlm(mode, pre_ln)
    gates = soft_gates(encoder.config)
    compact = prune(encoder, gates)
    counts, full = GateCounts.from_values(encoder.config, gates), GateCounts.full(compact.config)
    number = sum(p.numel() for p in compact.parameters())
    assert count_parameters(encoder.config, counts) == count_parameters(compact.config, full) == number
    assert count_macs_per_second(encoder.config, counts) == count_macs_per_second(compact.config, full)


def test_wavlm_base_costs_what_it_has() -> None:
    plain = EncoderConfig.from_json(make_config().to_json())
    base = dataclasses.replace(
        plain, layers=uniform_layers(4, 4, 6, 20, position_bias=True), position_buckets=320, position_heads=4
    )
    more = int(count_parameters(base, GateCounts.full(base))) - int(count_parameters(plain, GateCounts.full(plain)))
    assert more == 320 * 4 + 4 * (4 + 8 * 6 + 8)  # table; per layer grep_a and grep_linear


def gated_student(encoder: SpeechEncoder) -> ParsedCheckpoint:
    gates = GateSet(encoder.config, UNITS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(3 * torch.randn(gate.num_gates, generator=generator))
    return ParsedCheckpoint(
        family="ssl_student",
        config=encoder.config,
        encoder_state={name: p.detach() for name, p in encoder.named_parameters()},
        normalize=False,
        extra_state={f"gates.{name}": p.detach() for name, p in gates.named_parameters()},
        pretraining_options={"prune_units": UNITS},
    )


@torch.no_grad()
def test_a_pruned_wavlm_survives_its_checkpoint(tmp_path: Path) -> None:
    student = gated_student(make_wavlm())
    compact = prune_student(student, *padded_batch())
    assert compact.equivalence.holds
    options = {"_name": "ssl_student", "encoder": compact.config.to_json()}
    compat.write_checkpoint(tmp_path / "compact.pt", compact.state, options, {"normalize": False})
    parsed = parse_checkpoint(compat.load_checkpoint(tmp_path / "compact.pt"))
    assert parsed.config == compact.config
    encoder = SpeechEncoder(compact.config).eval()
    encoder.load_encoder_state(compact.state)
    source, _ = padded_batch()
    assert torch.equal(s3distill.load(tmp_path / "compact.pt")(source).x, encoder(source).x)
