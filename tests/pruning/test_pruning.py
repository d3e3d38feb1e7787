"""Pruned is exactly what was masked: conv channels, heads, FFN dims and whole sub-layers, in every kind of encoder."""

import dataclasses
from typing import Any

import pytest
import torch

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import GateSet, count_cost
from s3distill.gates.values import GateValues
from s3distill.pruning import compare, cut, plan_from_gates
from s3distill.pruning.compact import prune_student

UNITS = ["conv", "head", "ffn", "attention_layer", "ffn_layer"]
SHAPES = [
    pytest.param(mode, pre_ln, depth, id=f"{mode}-{'pre' if pre_ln else 'post'}LN-pos{depth}")
    for mode in ("default", "layer_norm")
    for pre_ln in (False, True)
    for depth in (1, 3)
]


def make_config(mode: str = "default", pre_ln: bool = False, depth: int = 1) -> EncoderConfig:
    return EncoderConfig(
        conv_layers=parse_conv_layers("[(12, 10, 5)] + [(14, 3, 2)] * 2 + [(10, 2, 2)]"),
        embed_dim=24,
        layers=uniform_layers(4, 4, 6, 20),
        extractor_mode=mode,
        conv_bias=mode == "layer_norm",
        layer_norm_first=pre_ln,
        pos_conv_kernel=9,
        pos_conv_groups=4,
        pos_conv_depth=depth,
    )


def make_encoder(config: EncoderConfig, seed: int = 0) -> SpeechEncoder:
    torch.manual_seed(seed)
    encoder = SpeechEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(
                0.2 * torch.randn_like(parameter)
            )  # affine parts too: all ones and zeros would hide mistakes
    return encoder


def soft_gates(config: EncoderConfig, seed: int = 0) -> GateValues:
    """About half of everything closed, the rest at values in (0.3, 1); layer 1 loses its attention, layer 2 its FFN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> torch.Tensor:
        values = 0.3 + 0.7 * torch.rand(size, generator=generator)
        closed = torch.rand(size, generator=generator) < 0.5
        closed[0] = False
        return values.masked_fill(closed, 0.0)

    layers = config.layers
    attention = [torch.tensor(0.7)] * len(layers)
    ffn = [torch.tensor(0.8)] * len(layers)
    attention[1], ffn[2] = torch.tensor(0.0), torch.tensor(0.0)
    heads = [draw(layer.num_heads) for layer in layers]
    heads[3] = torch.zeros(layers[3].num_heads)  # the sub-layer stays with its bias only
    return GateValues(
        conv=tuple(draw(conv.channels) for conv in config.conv_layers),
        heads=tuple(heads),
        ffn=tuple(draw(layer.ffn_dim) for layer in layers),
        attention_layers=tuple(attention),
        ffn_layers=tuple(ffn),
    )


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))
    padding_mask = torch.arange(4000) >= torch.tensor([4000, 2500, 3100])[:, None]
    return source.masked_fill(padding_mask, 0), padding_mask


def prune(encoder: SpeechEncoder, gates: GateValues) -> SpeechEncoder:
    config, state = cut(encoder.config, dict(encoder.named_parameters()), plan_from_gates(encoder.config, gates))
    compact = SpeechEncoder(config).eval()
    compact.load_encoder_state(state)
    return compact


@pytest.mark.parametrize(("mode", "pre_ln", "depth"), SHAPES)
def test_pruned_equals_masked(mode: str, pre_ln: bool, depth: int) -> None:
    encoder = make_encoder(make_config(mode, pre_ln, depth))
    gates = soft_gates(encoder.config)
    compact = prune(encoder, gates)
    result = compare(encoder, gates, compact, *padded_batch())
    assert result.relative_error <= 1e-5, result
    assert compact.config.layers[1].attention is False and compact.config.layers[2].ffn is False
    assert compact.config.layers[3].num_heads == 0 and compact.config.layers[3].attention is True


@pytest.mark.parametrize(("mode", "pre_ln", "depth"), SHAPES)
def test_gates_change_the_output(mode: str, pre_ln: bool, depth: int) -> None:
    """The equivalence above would hold for gates that do nothing; each unit on its own must move the output."""
    encoder = make_encoder(make_config(mode, pre_ln, depth))
    gates = soft_gates(encoder.config)
    source, padding_mask = padded_batch()
    with torch.no_grad():
        dense = encoder(source, padding_mask).x
        for unit in ("conv", "heads", "ffn", "attention_layers", "ffn_layers"):
            one = dataclasses.replace(GateValues.open(encoder.config), **{unit: getattr(gates, unit)})
            gated = encoder(source, padding_mask, gates=one).x
            assert (gated - dense).abs().max() / dense.abs().max() > 1e-2, unit


def test_dead_pre_ln_norms_go_and_post_ln_norms_stay() -> None:
    for pre_ln in (False, True):
        encoder = make_encoder(make_config(pre_ln=pre_ln))
        names = dict(prune(encoder, soft_gates(encoder.config)).named_parameters())
        assert ("encoder.layers.1.self_attn_layer_norm.weight" in names) is not pre_ln
        assert ("encoder.layers.2.final_layer_norm.weight" in names) is not pre_ln


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
@pytest.mark.parametrize("pre_ln", [False, True])
def test_prune_again_with_removed_layers(mode: str, pre_ln: bool) -> None:
    first = make_encoder(make_config(mode, pre_ln))
    second = prune(first, soft_gates(first.config))
    gates = GateSet(second.config, UNITS)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(torch.linspace(-6, 6, gate.num_gates))
    third = prune(second, gates.deterministic())
    result = compare(second, gates.deterministic(), third, *padded_batch())
    assert result.relative_error <= 1e-5
    assert count_cost(third.config, None, "params") < count_cost(second.config, None, "params")
    assert third.config.layers[1].attention is False and third.config.layers[2].ffn is False


def student_checkpoint(log_alpha: float, target: list[str]) -> ParsedCheckpoint:
    encoder = make_encoder(make_config())
    gates = GateSet(encoder.config, target)
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(torch.linspace(-6, 6, gate.num_gates) + log_alpha)
    return ParsedCheckpoint(
        family="ssl_student",
        config=encoder.config,
        encoder_state={name: p.detach() for name, p in encoder.named_parameters()},
        normalize=False,
        extra_state={f"gates.{name}": p.detach() for name, p in gates.named_parameters()},
        pretraining_options={"prune_units": target},
    )


def test_prune_student_counts_what_the_gates_keep() -> None:
    student = student_checkpoint(0.0, ["conv", "head", "ffn"])
    compact = prune_student(student, *padded_batch())
    assert compact.equivalence.holds
    assert sum(p.numel() for p in compact.state.values()) == count_cost(compact.config, None, "params")
    assert compact.after.as_dict()["ffn"] == tuple(layer.ffn_dim for layer in compact.config.layers)
    assert sum(compact.after.as_dict()["ffn"]) < sum(compact.before.as_dict()["ffn"])


def test_prune_without_gates_is_refused() -> None:
    student = dataclasses.replace(student_checkpoint(0.0, ["ffn"]), extra_state={})
    with pytest.raises(ValueError, match="has no gates to prune by"):
        prune_student(student, *padded_batch())


def test_a_student_that_changes_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_wrongly(*values: Any) -> Any:
        config, state = cut(*values)
        state["encoder.layers.0.fc1.weight"] *= 1.001
        return config, state

    monkeypatch.setattr("s3distill.pruning.compact.cut", cut_wrongly)
    student = student_checkpoint(0.0, ["ffn"])
    with pytest.raises(RuntimeError, match="differs from the gated one"):
        prune_student(student, *padded_batch())


def test_losing_a_whole_conv_layer_is_refused() -> None:
    config = make_config()
    gates = dataclasses.replace(GateValues.open(config), conv=(torch.zeros(12), None, None, None))
    with pytest.raises(ValueError, match="conv layer 0 would lose all of its 12 channels"):
        plan_from_gates(config, gates)
