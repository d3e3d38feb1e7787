"""The encoder's promises: padding changes nothing, every shape works, options do what they say, fairseq's interface."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s3distill.encoder.attention import SelfAttention, attention_mask_from_padding
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig, uniform_layers
from s3distill.encoder.conv import gated_conv, masked_group_norm
from s3distill.encoder.layers import LayerNorm, scale_gradient
from s3distill.encoder.model import EncoderOutput, SpeechEncoder
from s3distill.encoder.training_config import TrainingConfig
from s3distill.gates import GateValues

POST_LN = EncoderConfig(
    (ConvLayerConfig(12, 10, 5), ConvLayerConfig(10, 3, 2), ConvLayerConfig(8, 2, 2)),
    16,
    uniform_layers(3, 2, 8, 24),
    pos_conv_kernel=6,
    pos_conv_groups=4,
)
PRE_LN = dataclasses.replace(POST_LN, extractor_mode="layer_norm", layer_norm_first=True, conv_bias=True)
STACKED = dataclasses.replace(PRE_LN, layer_norm_first=False, pos_conv_kernel=9, pos_conv_depth=3)
UNEVEN = dataclasses.replace(
    POST_LN,
    layers=(
        LayerConfig(3, 5, 7),  # heads * head_dim is not the width
        LayerConfig(0, 8, 24),
        LayerConfig(2, 8, 0),
        LayerConfig(2, 8, 24, attention=False),
        LayerConfig(2, 8, 24, ffn=False),
        LayerConfig(2, 8, 24, attention=False, ffn=False),
        LayerConfig(1, 16, 3),
    ),
)
POSITION = {"position_buckets": 8, "position_max_distance": 20, "position_heads": 4}
WAVLM = dataclasses.replace(POST_LN, layers=uniform_layers(3, 4, 4, 24, position_bias=True), **POSITION)
WAVLM_UNEVEN = dataclasses.replace(
    UNEVEN,
    layers=tuple(
        dataclasses.replace(layer, position_heads=heads)
        for layer, heads in zip(UNEVEN.layers, ((0, 1, 3), (), (2, 1), (0, 1), (0, 3), (1, 2), (3,)), strict=True)
    ),
    **POSITION,
)
CONFIGS = {
    "post_ln": POST_LN,
    "pre_ln": PRE_LN,
    "stacked": STACKED,
    "uneven": UNEVEN,
    "uneven_pre_ln": dataclasses.replace(UNEVEN, layer_norm_first=True, extractor_mode="layer_norm"),
    "wavlm": WAVLM,
    "wavlm_uneven": WAVLM_UNEVEN,
    "wavlm_uneven_pre_ln": dataclasses.replace(WAVLM_UNEVEN, layer_norm_first=True, extractor_mode="layer_norm"),
}
all_shapes = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def make_encoder(name: str) -> SpeechEncoder:
    return new_encoder(CONFIGS[name])


def new_encoder(config: EncoderConfig, training: TrainingConfig | None = None, seed: int = 0) -> SpeechEncoder:
    """Random weights, biases and norms included, so that nothing is trivially right."""
    torch.manual_seed(seed)
    encoder = SpeechEncoder(config, training).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def make_batch(lengths: list[int], seed: int = 0, filler: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    source = torch.randn(len(lengths), max(lengths), generator=generator) + 0.1
    return source.masked_fill(padding_mask, filler), padding_mask


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def assert_same_output(ours: EncoderOutput, theirs: EncoderOutput, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b, tolerance)
    assert_close(ours.x, theirs.x, tolerance)


@all_shapes
@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(60, 900), min_size=1, max_size=4),
    seed=st.integers(0, 100),
    filler=st.sampled_from([0.0, 5.0]),
)
@torch.no_grad()
def test_padding_never_changes_a_result(name: str, lengths: list[int], seed: int, filler: float) -> None:
    encoder = make_encoder(name)
    source, padding_mask = make_batch(lengths, seed, filler)
    out = encoder(source, padding_mask)
    for i, length in enumerate(lengths):
        single = encoder(source[i : i + 1, :length])
        num_frames = single.x.shape[1]
        assert single.padding_mask is None
        assert num_frames == encoder.config.num_frames(length)
        if out.padding_mask is None:
            assert len(set(lengths)) == 1
        else:
            assert out.padding_mask[i].tolist() == [t >= num_frames for t in range(out.x.shape[1])]
        for ours, theirs in zip(out.hidden_states, single.hidden_states, strict=True):
            assert_close(ours[i, :num_frames], theirs[0])
        for ours, theirs in zip(out.ffn_outputs, single.ffn_outputs, strict=True):
            assert float((ours[i, :num_frames] - theirs[0]).abs().max()) < 1e-4
        assert_close(out.features[i, :num_frames], single.features[0])
        assert_close(out.x[i, :num_frames], single.x[0])


@torch.no_grad()
def test_a_padding_mask_without_padding_is_as_none() -> None:
    encoder = make_encoder("post_ln")
    source, padding_mask = make_batch([500, 500])
    out = encoder(source, padding_mask)
    assert out.padding_mask is None
    assert torch.equal(out.x, encoder(source).x)


@settings(deadline=None, max_examples=50)
@given(
    num_valid=st.lists(st.integers(8, 40), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 3.0, -50.0]),
    seed=st.integers(0, 1000),
)
def test_group_norm_over_valid_frames_is_a_loop(num_valid: list[int], offset: float, seed: int) -> None:
    torch.manual_seed(seed)
    channels, total = 5, max(num_valid) + 3
    x = (torch.randn(len(num_valid), channels, total) + offset).requires_grad_()
    weight, bias = torch.randn(channels), torch.randn(channels)
    normed = masked_group_norm(x, torch.tensor(num_valid), weight, bias, 1e-5)
    exact = x.double()
    rows = [
        F.group_norm(exact[i : i + 1, :, :n], channels, weight.double(), bias.double(), 1e-5)[0]
        for i, n in enumerate(num_valid)
    ]
    probe = torch.randn(channels, total)
    (ours,) = torch.autograd.grad(sum((normed[i, :, :n] * probe[:, :n]).sum() for i, n in enumerate(num_valid)), x)
    (theirs,) = torch.autograd.grad(sum((row * probe[:, : row.shape[1]]).sum() for row in rows), x)
    tolerance = 1e-5 if abs(offset) < 10 else 3e-4  # subtracting a mean of 50 costs two digits, whoever does it
    for i, row in enumerate(r.detach() for r in rows):
        assert_close(normed.detach()[i, :, : num_valid[i]], row, tolerance)
        assert float((ours[i] - theirs[i]).abs().max()) <= 10 * tolerance * max(1.0, float(theirs[i].abs().max()))
    assert torch.isfinite(normed).all()


@pytest.mark.parametrize("options", [{}, {"layer_norm_first": True}], ids=["post_ln", "pre_ln"])
@torch.no_grad()
def test_group_norm_over_padding_is_fairseqs_on_a_padded_batch(options: dict) -> None:
    pytest.importorskip("fairseq")
    from s3distill.encoder.checkpoint import parse_checkpoint
    from tests.encoder import checkpoints

    state, model = checkpoints.pretrained("wav2vec2", **options)
    parsed = parse_checkpoint(state)
    source, padding_mask = make_batch([9000, 5000, 7003])
    theirs = model.extract_features(source, padding_mask, mask=False)
    errors = {}
    for over_padding in (True, False):
        encoder = SpeechEncoder(dataclasses.replace(parsed.config, group_norm_over_padding=over_padding)).eval()
        encoder.load_encoder_state(parsed.encoder_state)
        out = encoder(source, padding_mask)
        assert torch.equal(out.padding_mask, theirs["padding_mask"])
        valid = ~out.padding_mask
        errors[over_padding] = float((out.x[valid] - theirs["x"][valid]).abs().max() / theirs["x"][valid].abs().max())
    assert errors[True] <= 1e-5
    assert errors[False] > 1e-3, "without the option the statistics must leave the padding out"


def test_a_waveform_without_a_frame_is_refused() -> None:
    encoder = make_encoder("post_ln")
    needed = encoder.config.receptive_field
    assert encoder(torch.randn(1, needed)).x.shape[1] == 1
    message = f"at least {needed} samples .* the shortest has {needed - 1}; drop such utterances"
    with pytest.raises(ValueError, match=message):
        encoder(torch.randn(1, needed - 1))
    with pytest.raises(ValueError, match=message):
        encoder(*make_batch([500, needed - 1]))
    with pytest.raises(ValueError, match=r"`padding_mask` must have the shape of `source`, \(2, 500\)"):
        encoder(torch.randn(2, 500), torch.ones(2, 10, dtype=torch.bool))


@all_shapes
@torch.no_grad()
def test_fewer_layers_are_the_lower_ones(name: str) -> None:
    encoder = make_encoder(name)
    source, padding_mask = make_batch([500, 300])
    whole = encoder(source, padding_mask)
    for num_layers in range(encoder.config.num_layers + 1):
        ran: list[int] = []
        hooks = [m.register_forward_hook(lambda *_, ran=ran: ran.append(1)) for m in encoder.encoder.layers]
        out = encoder(source, padding_mask, num_layers=num_layers)
        for hook in hooks:
            hook.remove()
        assert len(ran) == num_layers and len(out.hidden_states) == num_layers + 1
        for ours, theirs in zip(out.hidden_states, whole.hidden_states, strict=False):
            assert torch.equal(ours, theirs)
        last = num_layers == encoder.config.num_layers
        assert torch.equal(out.x, whole.x if last else whole.hidden_states[num_layers])


def extractor_gradients(scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoder = new_encoder(POST_LN, TrainingConfig(feature_grad_mult=scale)).train()
    torch.manual_seed(1)
    encoder(torch.randn(2, 500)).x.square().sum().backward()
    grads = {k: p.grad for k, p in encoder.named_parameters()}
    inside = {k: v for k, v in grads.items() if k.startswith("feature_extractor")}
    return inside, {k: v for k, v in grads.items() if k not in inside and k != "mask_emb"}


def test_feature_grad_mult_scales_the_extractors_gradient_only() -> None:
    inside, outside = extractor_gradients(1.0)
    assert all(v is not None and v.abs().sum() > 0 for v in inside.values())
    scaled_inside, scaled_outside = extractor_gradients(0.25)
    for name, gradient in inside.items():
        assert torch.equal(scaled_inside[name], 0.25 * gradient), name  # a power of 2: exact
    tenth, _ = extractor_gradients(0.1)
    for name, gradient in inside.items():
        torch.testing.assert_close(tenth[name], 0.1 * gradient, rtol=1e-4, atol=1e-6)
    frozen, frozen_outside = extractor_gradients(0.0)
    assert all(v is None for v in frozen.values())
    for name, gradient in outside.items():
        assert torch.equal(scaled_outside[name], gradient) and torch.equal(frozen_outside[name], gradient)


def test_scaling_a_gradient_is_the_identity_forwards() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = scale_gradient(x, 0.3)
    assert torch.equal(y, x) and scale_gradient(x, 1.0) is x
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 0.3))


@all_shapes
def test_checkpointed_activations_give_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        training = TrainingConfig(
            dropout=0.2, attention_dropout=0.1, activation_dropout=0.1, checkpoint_activations=checkpointed
        )
        encoder = new_encoder(CONFIGS[name], training).train()
        calls: list[int] = []
        encoder.encoder.layers[0].register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        torch.manual_seed(2)
        source, padding_mask = make_batch([500, 300])
        encoder(source, padding_mask).x.square().sum().backward()
        assert len(calls) == (2 if checkpointed else 1), "the layer must run again in the backward pass"
        gradients.append({k: p.grad for k, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-6)


def test_layerdrop_repeats_the_input_and_follows_torchs_seed() -> None:
    encoder = new_encoder(POST_LN, TrainingConfig(layerdrop=0.5)).train()
    source = torch.randn(1, 500)
    patterns = []
    for seed in range(12):
        torch.manual_seed(seed)
        states = encoder(source).hidden_states
        assert len(states) == 4
        patterns.append(tuple(a is b for a, b in itertools.pairwise(states)))
        torch.manual_seed(seed)
        again = encoder(source).hidden_states
        assert patterns[-1] == tuple(a is b for a, b in itertools.pairwise(again))
    assert len(set(patterns)) > 3
    encoder.eval()
    states = encoder(source).hidden_states
    assert not any(a is b for a, b in itertools.pairwise(states))


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    training = TrainingConfig(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, dropout_input=0.5)
    encoder = new_encoder(POST_LN, training)
    source = torch.randn(1, 500)
    assert torch.equal(encoder(source).x, encoder(source).x)
    assert torch.equal(encoder(source).x, new_encoder(POST_LN)(source).x)
    encoder.train()
    assert not torch.allclose(encoder(source).x, encoder(source).x)


def naive_attention(attention: SelfAttention, x: Tensor, num_valid: list[int], gate: Tensor | None) -> Tensor:
    """One row, head and query at a time."""
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    width = attention.head_dim
    rows = []
    for b, valid in enumerate(num_valid):
        heads = []
        for h in range(attention.num_heads):
            part = slice(h * width, (h + 1) * width)
            weights = torch.softmax(q[b, :, part] @ k[b, :valid, part].T / width**0.5, -1)
            heads.append((weights @ v[b, :valid, part]) * (1.0 if gate is None else gate[h]))
        rows.append(attention.out_proj(torch.cat(heads, -1)))
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(2, 8), (3, 5), (1, 3)])
@torch.no_grad()
def test_attention_is_a_loop_over_heads(num_heads: int, head_dim: int, gated: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, num_heads, head_dim).eval()
    for parameter in attention.parameters():
        parameter.normal_(std=0.5)
    gate = torch.rand(num_heads) if gated else None
    x, num_valid = torch.randn(3, 9, 16), [9, 4, 1]
    padding_mask = torch.arange(9) >= torch.tensor(num_valid)[:, None]
    ours = attention(x, attention_mask_from_padding(padding_mask), gate)
    assert_close(ours, naive_attention(attention, x, num_valid, gate))
    assert_close(attention(x, None, gate), naive_attention(attention, x, [9, 9, 9], gate))


@torch.no_grad()
def test_attention_with_a_closed_head_is_attention_without_it() -> None:
    torch.manual_seed(0)
    whole, cut = SelfAttention(16, 3, 4).eval(), SelfAttention(16, 2, 4).eval()
    for parameter in whole.parameters():
        parameter.normal_()
    kept = [*range(0, 4), *range(8, 12)]  # heads 0 and 2
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(cut, name).weight.copy_(getattr(whole, name).weight[kept])
        getattr(cut, name).bias.copy_(getattr(whole, name).bias[kept])
    cut.out_proj.weight.copy_(whole.out_proj.weight[:, kept])
    cut.out_proj.bias.copy_(whole.out_proj.bias)
    x = torch.randn(2, 7, 16)
    assert_close(whole(x, None, torch.tensor([1.0, 0.0, 1.0])), cut(x))


@torch.no_grad()
def test_no_head_leaves_the_bias_and_no_ffn_dim_too() -> None:
    encoder = make_encoder("uneven")
    no_heads, no_ffn = encoder.encoder.layers[1], encoder.encoder.layers[2]
    x = torch.randn(2, 5, 16)
    bias = no_heads.self_attn.out_proj.bias
    assert bias.abs().sum() > 0 and torch.equal(no_heads.self_attn(x), bias.expand(2, 5, 16))
    _, ffn_output = no_ffn(x)
    assert_close(ffn_output, no_ffn.fc2.bias.expand(2, 5, 16))


@pytest.mark.parametrize("layer_norm_first", [False, True])
@torch.no_grad()
def test_a_closed_sub_layer_is_an_absent_one(layer_norm_first: bool) -> None:
    config = dataclasses.replace(POST_LN, layer_norm_first=layer_norm_first)
    whole = new_encoder(config)
    shapes = list(config.layers)
    shapes[0] = dataclasses.replace(shapes[0], attention=False)
    shapes[2] = dataclasses.replace(shapes[2], ffn=False)
    cut = new_encoder(dataclasses.replace(config, layers=tuple(shapes)))
    cut.load_encoder_state({k: v for k, v in whole.state_dict().items() if k in cut.state_dict()})
    closed, none = torch.tensor(0.0), (None,) * 3
    gates = GateValues((None,) * 3, none, none, (closed, None, None), (None, None, closed))
    source, padding_mask = make_batch([500, 300])
    out = cut(source, padding_mask)
    assert_same_output(whole(source, padding_mask, gates=gates), out)
    assert not torch.allclose(whole(source, padding_mask).x, out.x)
    assert torch.equal(out.ffn_outputs[2], torch.zeros_like(out.x))
    names = set(cut.state_dict())
    assert not any(n.startswith("encoder.layers.0.self_attn.") or n.startswith("encoder.layers.2.fc") for n in names)
    # behind a post-LN sub-layer the norm is still a function; in front of an absent pre-LN one it is not
    assert ("encoder.layers.0.self_attn_layer_norm.weight" in names) is (not layer_norm_first)
    assert ("encoder.layers.2.final_layer_norm.weight" in names) is (not layer_norm_first)


@torch.no_grad()
def test_open_gates_change_nothing_and_every_gate_changes_something() -> None:
    encoder = new_encoder(PRE_LN)
    source, padding_mask = make_batch([500, 300])
    plain = encoder(source, padding_mask)
    assert_same_output(encoder(source, padding_mask, gates=GateValues.open(PRE_LN)), plain)
    ones = GateValues(
        tuple(torch.ones(c.channels) for c in PRE_LN.conv_layers),
        tuple(torch.ones(layer.num_heads) for layer in PRE_LN.layers),
        tuple(torch.ones(layer.ffn_dim) for layer in PRE_LN.layers),
        (torch.tensor(1.0),) * 3,
        (torch.tensor(1.0),) * 3,
    )
    assert_same_output(encoder(source, padding_mask, gates=ones), plain)
    for kind in ("conv", "heads", "ffn", "attention_layers", "ffn_layers"):
        for i, gate in enumerate(getattr(ones, kind)):
            half = gate.clone()
            half.view(-1)[0] = 0.0
            changed = list(getattr(ones, kind))
            changed[i] = half
            out = encoder(source, padding_mask, gates=dataclasses.replace(ones, **{kind: tuple(changed)}))
            assert not torch.allclose(out.x, plain.x, atol=1e-5), (kind, i)


class ScaledConv(nn.Conv1d):
    """A conv whose weight is not what it multiplies with, such as a masked one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("conv_type", [nn.Conv1d, ScaledConv])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_conv_takes_the_gate_of_its_input_on_its_weights(conv_type: type[nn.Conv1d], groups: int) -> None:
    torch.manual_seed(0)
    conv = conv_type(6, 9, 3, stride=2, bias=True, groups=groups).double()
    x, gate = torch.randn(2, 6, 20, dtype=torch.double, requires_grad=True), torch.rand(6, dtype=torch.double)
    gate[1] = 0
    gate.requires_grad_()
    ours, theirs = gated_conv(conv, x, gate), conv(x * gate[:, None])
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, conv(x))
    probe = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * probe).sum(), (x, gate, conv.weight)) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(gated_conv(conv, x, None), conv(x))


@torch.no_grad()
def test_layer_norm_behind_a_gate_counts_open_channels() -> None:
    torch.manual_seed(0)
    norm, cut = LayerNorm(6).eval(), nn.LayerNorm(4)
    norm.weight.normal_()
    norm.bias.normal_()
    gate = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0, 1.0])
    kept = gate > 0
    cut.weight.copy_(norm.weight[kept])
    cut.bias.copy_(norm.bias[kept])
    x = torch.randn(3, 5, 6)
    assert_close(norm(x, gate)[..., kept], cut(x[..., kept]))
    assert_close(norm(x, torch.ones(6)), F.layer_norm(x, (6,), norm.weight, norm.bias))
    norm.train()  # weighted by the gate itself, so that the statistics are differentiable
    mean = (x @ gate) / gate.sum()
    variance = ((x - mean[..., None]) ** 2 @ gate) / gate.sum()
    expected = (x - mean[..., None]) / (variance + norm.eps).sqrt()[..., None] * norm.weight + norm.bias
    assert_close(norm(x, gate), expected)


class CountingLinear(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
@torch.no_grad()
def test_a_swapped_in_linear_is_called(name: str) -> None:
    encoder = new_encoder(POST_LN)
    source = torch.randn(1, 500)
    plain = encoder(source).x
    attention = encoder.encoder.layers[1].self_attn
    old = getattr(attention, name)
    swapped = CountingLinear(old.in_features, old.out_features)
    swapped.load_state_dict(old.state_dict())
    CountingLinear.calls = 0
    setattr(attention, name, swapped)
    out = encoder(source).x
    assert CountingLinear.calls == 1 and not torch.allclose(out, plain, atol=1e-5)


def test_every_parameter_learns_in_every_shape() -> None:
    for name, config in CONFIGS.items():
        encoder = new_encoder(config).train()
        source, padding_mask = make_batch([500, 300])
        probe = torch.randn(encoder(source, padding_mask).x.shape)
        (encoder(source, padding_mask).x * probe).sum().backward()
        for key, parameter in encoder.named_parameters():
            if parameter.numel() == 0 or key == "mask_emb":
                continue
            if parameter.grad is None:  # only what stands in front of a layer without a head
                assert key.startswith(("encoder.layers.1.self_attn.", "encoder.layers.1.self_attn_layer_norm.")), key
                assert config.layers[1].num_heads == 0 and config.layer_norm_first | ("layer_norm" not in key)
            elif not key.endswith("k_proj.bias"):  # softmax does not see what is added to all of its inputs
                nothing_behind = config.layers[2].ffn_dim == 0 and key.startswith("encoder.layers.2.final_layer_norm")
                assert parameter.grad.abs().sum() > 0 or (nothing_behind and config.layer_norm_first), (name, key)


def test_weights_that_do_not_fit_are_named() -> None:
    encoder = make_encoder("post_ln")
    state = dict(encoder.state_dict())
    del state["layer_norm.weight"]
    state["encoder.layers.2.fc1.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as raised:
        new_encoder(POST_LN).load_encoder_state(state, "teacher.pt")
    message = str(raised.value)
    assert message.startswith("teacher.pt does not fit the encoder's shape; missing: ['layer_norm.weight']")
    assert "encoder.layers.2.fc1.bias: (5,) instead of (24,)" in message and "(1 and 1 in all)" in message


def make_student(**options: object) -> nn.Module:
    pytest.importorskip("fairseq")
    from omegaconf import OmegaConf

    from s3distill.models.ssl_student import SslStudent, SslStudentConfig
    from tests.encoder import checkpoints

    cfg = OmegaConf.structured(SslStudentConfig(**{**checkpoints.SMALL, **options}, normalize=False, seed=1))
    return SslStudent.build_model(cfg, task=object())


@pytest.mark.parametrize("layer_norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_student_has_fairseqs_interface(padded: bool, layer_norm_first: bool) -> None:
    student = make_student(
        layer_norm_first=layer_norm_first, extractor_mode="layer_norm", distill_layers="0,1,3", prune_units=["head"]
    ).eval()
    from tests.encoder import checkpoints

    _, model = checkpoints.pretrained("wav2vec2", layer_norm_first=layer_norm_first, extractor_mode="layer_norm")
    student.load_encoder_state(dict(model.named_parameters()))
    student.remove_pretraining_modules()
    assert not any(key.startswith(("heads.", "lagrangian.")) for key in student.state_dict())
    student.gates = None
    source, padding_mask = make_batch([9000, 5000] if padded else [9000, 9000])
    for layer in (None, 0, 1, 2):
        ours = student.extract_features(source, padding_mask, mask=False, layer=layer)
        theirs = model.extract_features(source, padding_mask, mask=False, layer=layer)
        if padded:
            assert torch.equal(ours["padding_mask"], theirs["padding_mask"])
            valid = ~ours["padding_mask"]
        else:
            assert ours["padding_mask"] is None and theirs["padding_mask"] is None
            valid = torch.ones(ours["x"].shape[:2], dtype=torch.bool)
        assert_close(ours["x"][valid], theirs["x"][valid])
        assert_close(ours["features"][valid], theirs["features"][valid])
        assert len(ours["layer_results"]) == (3 if layer is None else layer + 1) == len(theirs["layer_results"])
        for our_result, their_result in zip(ours["layer_results"], theirs["layer_results"], strict=True):
            assert len(our_result) == len(their_result) == 3
            for i in (0, 2):  # outputs and FFN outputs, [T, B, C]
                assert our_result[i].shape == their_result[i].shape == (27, 2, 32)
                assert_close(our_result[i].transpose(0, 1)[valid], their_result[i].transpose(0, 1)[valid])


def test_a_student_masks_as_its_options_say() -> None:
    student = make_student(mask_prob=0.6, mask_length=3).eval()
    source = torch.randn(2, 9000)
    features = [student.extract_features(source, None, mask=mask)["x"] for mask in (False, False, True)]
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2])
