"""Pruned is what was masked, and costs what was counted, in every variant of the encoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import UNITS, GateCounts, GateSet, GateValues, count_macs_per_second, count_parameters
from s3distill.pruning import compare, cut, plan_from_gates
from tests.encoder.variant_configs import VARIANTS, WAVLM, changed, make_batch, new_encoder, reusing

every_variant = pytest.mark.parametrize("name", list(VARIANTS))


def make_gates(config: EncoderConfig, units: list[str], seed: int = 0) -> GateSet:
    """About a third of everything closed in evaluation, the rest soft."""
    gates = GateSet(config, units)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(1 + 2 * torch.randn(gate.log_alpha.shape, generator=generator))
    return gates


def num_parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SpeechEncoder(config).parameters())


def prune(encoder: SpeechEncoder, values: GateValues) -> SpeechEncoder:
    config, state = cut(encoder.config, encoder.state_dict(), plan_from_gates(encoder.config, values))
    compact = SpeechEncoder(config).eval()
    compact.load_encoder_state(state)
    assert set(state) == set(compact.state_dict())
    return compact


@every_variant
@pytest.mark.parametrize("units", [["conv", "head", "ffn"], list(UNITS)], ids=["inner", "all"])
def test_pruned_is_what_was_masked_and_costs_what_was_counted(name: str, units: list[str]) -> None:
    encoder = new_encoder(VARIANTS[name])
    source, padding_mask = make_batch([1200, 900])
    for seed in range(4):
        gates = make_gates(encoder.config, units, seed)
        values = gates.deterministic()
        compact = prune(encoder, values)
        result = compare(encoder, values, compact, source, padding_mask)
        assert result.relative_error <= 1e-5, (seed, result)
        counts = gates.kept_counts()
        assert counts == GateCounts.from_values(encoder.config, values)
        assert count_parameters(encoder.config, counts) == num_parameters(compact.config)
        full = GateCounts.full(compact.config)
        assert count_parameters(compact.config, full) == num_parameters(compact.config) < num_parameters(encoder.config)
        macs = count_macs_per_second(encoder.config, counts)
        assert macs == count_macs_per_second(compact.config, full)
        # what was pruned can be saved, and pruned again
        assert EncoderConfig.from_json(compact.config.to_json()) == compact.config
    again = make_gates(compact.config, ["conv"], seed=9).deterministic()
    assert compare(compact, again, prune(compact, again), source, padding_mask).relative_error <= 1e-5


@every_variant
def test_every_gate_learns_from_the_output(name: str) -> None:
    encoder = new_encoder(VARIANTS[name])
    gates = make_gates(encoder.config, list(UNITS))
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.zero_()  # nearly always between 0 and 1, where there is a gradient
    source, padding_mask = make_batch([1200, 900])
    for seed in range(16):
        out = encoder(source, padding_mask, gates=gates.sample(seed))
        (out.x * torch.randn(out.x.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for unit, layer, gate in gates.all_gates():
        assert gate.log_alpha.grad is not None and bool((gate.log_alpha.grad != 0).any()), (unit, layer)


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("shared_all_pre_ln", "head", [0, 2]),
        ("shared_all_pre_ln", "ffn_layer", [0, 2]),
        ("shared_attention", "head", [0, 3]),
        ("shared_attention", "ffn", [0, 1, 2, 3]),
        ("shared_ffn", "ffn", [0, 2]),
        ("shared_ffn", "attention_layer", [0, 1, 2, 3]),
        ("reused", "head", [0, 2]),
        ("reused", "attention_layer", [0, 2]),
        ("reused", "ffn", [0, 1, 2, 3]),
        ("reused_unequal", "head", [0, 4]),
        ("separable", "conv", [0, 1, 2]),
    ],
)
def test_layers_in_common_have_gates_in_common(name: str, unit: str, expected: list[int]) -> None:
    gates = make_gates(VARIANTS[name], [unit])
    assert sorted(gates.gates(unit)) == expected
    field = {
        "conv": "conv",
        "head": "heads",
        "ffn": "ffn",
        "attention_layer": "attention_layers",
        "ffn_layer": "ffn_layers",
    }
    values = getattr(gates.deterministic(), field[unit])
    owner = expected[0]
    for layer, value in enumerate(values):
        owner = layer if layer in expected else owner
        if value is not None:
            assert torch.equal(value, values[owner])


def test_gates_that_contradict_are_refused() -> None:
    for config in (changed(shared="attention"), reusing(WAVLM, 1, 2, 3)):
        values = make_gates(config, ["head"]).deterministic()
        heads = (*values.heads[:2], torch.tensor([1.0, 0.0, 1.0, 0.0]), *values.heads[3:])
        with pytest.raises(ValueError, match=r"layers 0 and 2 share .* gates of head must be the same, but differ"):
            plan_from_gates(config, dataclasses.replace(values, heads=heads))
        with pytest.raises(ValueError, match="layers 0 and 3 share"):
            plan_from_gates(config, dataclasses.replace(values, heads=(*values.heads[:3], None)))


def test_reused_wavlm_maps_keep_their_columns() -> None:
    encoder = new_encoder(VARIANTS["reused_wavlm"])
    gates = make_gates(encoder.config, ["head"])
    with torch.no_grad():
        gates.gates("head")[0].log_alpha.copy_(torch.tensor([9.0, -9.0, 9.0, 9.0]))
        gates.gates("head")[2].log_alpha.copy_(torch.tensor([-9.0, 9.0, 9.0, -9.0]))
    compact = prune(encoder, gates.deterministic())
    heads = [layer.position_heads for layer in compact.config.layers]
    assert heads == [(0, 2, 3), (0, 2, 3), (1, 2), (1, 2)]
    assert compact.encoder.layers[1].self_attn.grep_linear is None


def test_closing_a_source_closes_those_that_reuse_it() -> None:
    encoder = new_encoder(VARIANTS["reused"])
    gates = make_gates(encoder.config, ["attention_layer"])
    with torch.no_grad():
        gates.gates("attention_layer")[0].log_alpha.fill_(-9)
        gates.gates("attention_layer")[2].log_alpha.fill_(9)
    layers = prune(encoder, gates.deterministic()).config.layers
    assert [layer.attention for layer in layers] == [False, False, True, True]
    assert [layer.reuses_attention for layer in layers] == [False, False, False, True]
