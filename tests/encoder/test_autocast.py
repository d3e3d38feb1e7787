"""The encoder under autocast: matrix products in bfloat16; statistics, residual stream and gates in float32."""

from __future__ import annotations

import pytest
import torch

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.conv import masked_group_norm
from s3distill.encoder.layers import LayerNorm
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import GateSet
from tests.encoder.variant_configs import VARIANTS


def make_config(extractor_mode: str = "default", layer_norm_first: bool = False) -> EncoderConfig:
    return EncoderConfig(
        conv_layers=(ConvLayerConfig(12, 10, 5), ConvLayerConfig(8, 3, 2), ConvLayerConfig(8, 2, 2)),
        layers=uniform_layers(2, 2, 8, 32),
        embed_dim=16,
        pos_conv_kernel=4,
        pos_conv_groups=2,
        extractor_mode=extractor_mode,
        layer_norm_first=layer_norm_first,
    )


def test_gate_weighted_statistics_are_those_without_autocast() -> None:
    torch.manual_seed(0)
    norm, x, gate = LayerNorm(64), 3 + torch.randn(5, 7, 64), torch.rand(64)
    expected = norm(x, gate)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x, gate), expected)


def test_group_norm_over_valid_frames_is_that_without_autocast() -> None:
    torch.manual_seed(0)
    x, num_valid = 3 + torch.randn(3, 4, 50), torch.tensor([50, 20, 33])
    arguments = (x, num_valid, torch.randn(4), torch.randn(4), 1e-5)
    expected = masked_group_norm(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_group_norm(*arguments), expected)


@pytest.mark.parametrize("layer_norm_first", [False, True])
@pytest.mark.parametrize("extractor_mode", ["default", "layer_norm"])
def test_gated_encoder_is_near_float32_and_its_residual_stream_float32(
    extractor_mode: str, layer_norm_first: bool
) -> None:
    torch.manual_seed(0)
    config = make_config(extractor_mode, layer_norm_first)
    encoder, gates = SpeechEncoder(config), GateSet(config, ("conv", "head", "ffn"), init_drop=0.3)
    source = torch.randn(2, 2000)
    padding_mask = torch.arange(2000) >= torch.tensor([2000, 1500])[:, None]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = encoder(source, padding_mask, gates=gates.sample(3))
        assert all(state.dtype == torch.float32 for state in out.hidden_states)
        loss = (out.x * torch.linspace(-1, 1, out.x.numel()).view_as(out.x))[~out.padding_mask].sum()
        grads = torch.autograd.grad(loss, [*gates.parameters(), *encoder.encoder.parameters()], allow_unused=True)
        results.append((out.x.detach()[~out.padding_mask], grads))
    (exact, exact_grads), (rounded, rounded_grads) = results
    error = float((exact - rounded).norm() / exact.norm())
    assert 1e-6 < error < 0.03
    for a, b in zip(exact_grads, rounded_grads, strict=True):
        if a is not None:
            assert b.dtype == torch.float32
            assert float((a - b).norm()) <= 0.1 * float(a.norm()) + 1e-4


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_residual_stream_of_every_variant_is_float32(name: str) -> None:
    torch.manual_seed(0)
    encoder = SpeechEncoder(VARIANTS[name]).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = encoder(torch.randn(1, 3000))
    assert {state.dtype for state in out.hidden_states} == {torch.float32}
