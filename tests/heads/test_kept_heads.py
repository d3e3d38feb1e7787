"""Prediction heads at inference: the same predictions, alone or as a weighted sum that learns."""

from __future__ import annotations

import pytest
import torch

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import GateCounts, count_macs_per_second, count_parameters
from s3distill.gates.output_cost import output_parameters
from s3distill.heads import HeadsConfig, KeptHeads, LayerHeads, keep_heads

PAIRS = ((1, 4), (2, 8), (3, 12))
MODES = [("predlayer", "own"), ("layer2layer", "own"), ("layer2layer", "shared")]


def trained(mode: str, sharing: str, seed: int = 0) -> LayerHeads:
    torch.manual_seed(seed)
    return LayerHeads(HeadsConfig(PAIRS, 4, 6, num_student_layers=3, mode=mode, sharing=sharing, init="default"))


def hidden_states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 9, 4, generator=generator) for _ in range(4)]


def kept(heads: LayerHeads, layers: list[int] | None) -> KeptHeads:
    config, state = keep_heads(heads.config, heads.state_dict(), layers)
    module = KeptHeads(config)
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize(("mode", "sharing"), MODES)
@pytest.mark.parametrize("layer", [4, 8, 12])
def test_one_head_is_the_output(mode: str, sharing: str, layer: int) -> None:
    heads = trained(mode, sharing)
    module = kept(heads, [layer])
    assert module.layer_weights is None
    expected = heads(hidden_states())[[4, 8, 12].index(layer)]
    torch.testing.assert_close(module(hidden_states()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "sharing"), MODES)
def test_several_are_summed_with_weights_that_learn(mode: str, sharing: str) -> None:
    heads = trained(mode, sharing)
    module = kept(heads, [12, 4])
    predictions = heads(hidden_states())
    torch.testing.assert_close(module(hidden_states()), (predictions[2] + predictions[0]) / 2, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        module.layer_weights.copy_(torch.tensor([1.0, -0.5]))
    shares = torch.tensor([1.0, -0.5]).softmax(0)
    torch.testing.assert_close(
        module(hidden_states()), shares[0] * predictions[2] + shares[1] * predictions[0], rtol=1e-5, atol=1e-6
    )
    (module(hidden_states()) - predictions[0].detach()).square().mean().backward()
    # towards layer 4, the second: its weight is to rise
    assert module.layer_weights.grad[1] < 0 < module.layer_weights.grad[0]


def test_what_cannot_be_kept() -> None:
    heads = trained("predlayer", "own")
    with pytest.raises(ValueError, match=r"different ones of \[4, 8, 12\].*are \[7\]"):
        kept(heads, [7])
    with pytest.raises(ValueError, match=r"different ones"):
        kept(heads, [4, 4])
    with pytest.raises(ValueError, match="without heads"):
        keep_heads(HeadsConfig(PAIRS, 4, 4, 3, mode="none"), {}, None)
    with pytest.raises(ValueError, match="change the frame rate"):
        keep_heads(HeadsConfig(PAIRS, 4, 4, 3, upsample=2), {}, None)


@pytest.mark.parametrize(("mode", "sharing"), MODES)
@pytest.mark.parametrize("layers", [[8], None])
def test_an_encoder_whose_output_they_are(mode: str, sharing: str, layers: list[int] | None) -> None:
    """Their prediction is its output, its shape survives JSON, and they are counted to the digit."""
    heads = trained(mode, sharing)
    output, state = keep_heads(heads.config, heads.state_dict(), layers)
    shape = EncoderConfig(
        conv_layers=(ConvLayerConfig(8, 10, 5), ConvLayerConfig(8, 3, 2)),
        embed_dim=4,
        layers=uniform_layers(3, 2, 2, 8),
        layer_norm_first=True,
        pos_conv_kernel=4,
        pos_conv_groups=2,
        output=output,
    )
    assert EncoderConfig.from_json(shape.to_json()) == shape and shape.output_dim == 6
    encoder = SpeechEncoder(shape).eval()
    encoder.output_heads.load_state_dict(state)
    out = encoder(torch.randn(2, 400, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(out.x, KeptHeads.forward(encoder.output_heads, out.hidden_states))
    assert out.x.shape[-1] == 6 and out.hidden_states[-1].shape[-1] == 4
    assert encoder(torch.randn(1, 400), num_layers=2).x.shape[-1] == 4, "a lower layer is the layer, as it was"
    counts = GateCounts.full(shape)
    assert count_parameters(shape, counts) == sum(p.numel() for p in encoder.parameters())
    assert output_parameters(output) == sum(p.numel() for p in encoder.output_heads.parameters())
    linears = [m for m in encoder.output_heads.modules() if isinstance(m, torch.nn.Linear)]
    frames = shape.num_frames(160_000)
    without = EncoderConfig.from_dict({**shape.to_dict(), "output": None})
    macs = count_macs_per_second(shape, counts) - count_macs_per_second(without, counts)
    per_frame = sum(m.in_features * m.out_features for m in linears)
    assert macs == pytest.approx(per_frame * frames / 10)
