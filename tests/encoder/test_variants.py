"""Variants of the encoder: each against a plain reference, and every one under padding, saving, gradients and dropped layers."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s3distill.encoder.attention import SelfAttention
from s3distill.encoder.config import EncoderConfig, parse_conv_layers
from s3distill.encoder.efficient_attention import WindowedAttention, num_pairs
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import VARIANT_OPTIONS, config_from_options, options_from_config
from s3distill.encoder.training_config import TrainingConfig
from tests.encoder.variant_configs import (
    PLAIN,
    PRE_LN,
    VARIANTS,
    WAVLM,
    changed,
    make_batch,
    new_encoder,
    reusing,
    separated,
)

every_variant = pytest.mark.parametrize("name", list(VARIANTS))


@cache
def make_encoder(name: str) -> SpeechEncoder:
    return new_encoder(VARIANTS[name])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@every_variant
@settings(deadline=None, max_examples=8)
@given(
    lengths=st.lists(st.integers(90, 1500), min_size=2, max_size=3),
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
        frames = single.x.shape[1]
        assert frames == encoder.config.num_frames(length) > 0
        if out.padding_mask is not None:
            assert out.padding_mask[i].tolist() == [t >= frames for t in range(out.x.shape[1])]
        for ours, theirs in zip(out.hidden_states, single.hidden_states, strict=True):
            assert ours.isfinite().all()
            assert_close(ours[i, :frames], theirs[0])
        assert_close(out.x[i, :frames], single.x[0])


@every_variant
def test_parameters_exist_once_and_all_of_them_learn(name: str) -> None:
    encoder = new_encoder(VARIANTS[name], TrainingConfig(dropout=0.1, attention_dropout=0.1)).train()
    state = encoder.state_dict()
    pointers = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(pointers)) == len(pointers)
    assert set(state) == set(dict(encoder.named_parameters()))
    source, padding_mask = make_batch([800, 500])
    out = encoder(source, padding_mask)
    (out.x * torch.randn(out.x.shape)).sum().backward()
    for key, parameter in encoder.named_parameters():
        if parameter.numel() and key != "mask_emb":
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), key


@every_variant
@torch.no_grad()
def test_saved_is_loaded_and_the_config_survives_json(name: str) -> None:
    encoder = make_encoder(name)
    config = EncoderConfig.from_json(encoder.config.to_json())
    assert config == encoder.config
    again = SpeechEncoder(config).eval()
    again.load_encoder_state(encoder.state_dict())
    source, padding_mask = make_batch([800, 500])
    assert torch.equal(again(source, padding_mask).x, encoder(source, padding_mask).x)
    options = options_from_config(config, "wav2vec2", False)
    # where fairseq's model cannot have the shape, the file is of the one that can
    assert options["_name"] == ("wav2vec2" if name == "pointwise" else "ssl_student")
    assert config_from_options(options, options["_name"]) == config


@every_variant
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    source, padding_mask = make_batch([800, 500])
    gradients = []
    for recompute in (False, True):
        encoder = new_encoder(VARIANTS[name], TrainingConfig(checkpoint_activations=recompute)).train()
        encoder(source, padding_mask).x.square().sum().backward()
        gradients.append({key: p.grad for key, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], rtol=1e-4, atol=1e-4), key


@every_variant
def test_half_precision_stays_near_float32(name: str) -> None:
    """Cast as a whole, as teachers are, and under autocast, gradients included."""
    source, padding_mask = make_batch([800, 500])
    encoder = new_encoder(VARIANTS[name])
    expected = encoder(source, padding_mask)
    valid = slice(None) if expected.padding_mask is None else ~expected.padding_mask
    with torch.no_grad():
        cast = new_encoder(VARIANTS[name]).bfloat16()(source.bfloat16(), padding_mask).x
    with torch.autocast("cpu", torch.bfloat16):
        auto = encoder(source, padding_mask).x
    auto.float().square().sum().backward()
    for out in (cast, auto):
        assert_close(out[valid].detach().float(), expected.x[valid].detach(), 0.1)
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@every_variant
def test_dropped_layers_leave_a_working_encoder(name: str) -> None:
    encoder = new_encoder(VARIANTS[name], TrainingConfig(layerdrop=0.5)).train()
    source, padding_mask = make_batch([800, 500])
    outputs = []
    for seed in range(8):
        torch.manual_seed(seed)
        out = encoder(source, padding_mask)
        assert out.x.isfinite().all() and len(out.hidden_states) == encoder.config.num_layers + 1
        outputs.append(out.x.detach())
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("name", ["everything_shared_windowed", "everything_reused", "everything_linformer"])
def test_it_exports_with_any_length(name: str) -> None:
    """`torch.export`, on which ONNX builds, must fix neither the number of blocks nor that of projected frames."""
    encoder = make_encoder(name)

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, source: Tensor) -> Tensor:
            return self.encoder(source).x

    dynamic = {"source": {1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Output(), (torch.randn(1, 3000),), dynamic_shapes=dynamic)
    longer = torch.randn(1, 5000)
    torch.testing.assert_close(program.module()(longer), encoder(longer).x)


def test_old_configs_read_as_they_were() -> None:
    values = PLAIN.to_dict()
    for name in list(values):
        if name.startswith(("time_", "shared", "attention", "linformer")):
            del values[name]
    for part in ("conv_layers", "layers"):
        for shape in values[part]:
            shape.pop("separable", None)
            shape.pop("reuses_attention", None)
    assert EncoderConfig.from_json(json.dumps(values)) == PLAIN


# separable convolutions


@torch.no_grad()
def test_a_separable_convolution_is_two_convolutions() -> None:
    encoder = new_encoder(separated(PLAIN, 1)).feature_extractor
    x = torch.randn(2, 12, 40)
    depthwise, pointwise = encoder.conv_layers[1].conv
    assert depthwise.weight.shape == (12, 1, 3) and pointwise.weight.shape == (10, 12, 1)
    expected = torch.zeros(2, 10, 19)
    for t in range(19):
        window = x[:, :, 2 * t : 2 * t + 3]  # [B, 12, 3]
        expected[:, :, t] = (window * depthwise.weight[:, 0]).sum(-1) @ pointwise.weight[:, :, 0].T
    assert_close(encoder.conv_layers[1](x), F.gelu(expected))


# time reduction


@torch.no_grad()
def test_time_reduction_is_a_convolution_in_front_of_the_layers() -> None:
    """Same weights without it give what enters; the layers then see one frame for two, the odd last one left out."""
    encoder = new_encoder(changed(time_reduction=2))
    plain = SpeechEncoder(PLAIN).eval()
    plain.load_state_dict(encoder.state_dict(), strict=False)
    source = torch.randn(1, 20 * 31 + 60)
    features = plain(source).hidden_states[0]
    assert features.shape[1] % 2 == 1  # so that one is left over
    conv = encoder.encoder.time_reduction
    pairs = features[:, :-1].unflatten(1, (-1, 2))  # [B, T // 2, 2, C]
    expected = torch.einsum("btkc,dck->btd", pairs, conv.weight) + conv.bias
    out = encoder(source)
    assert_close(out.hidden_states[0], expected)
    assert out.features.shape[1] == features.shape[1] == encoder.config.num_feature_frames(source.shape[1])
    assert {state.shape[1] for state in out.hidden_states} == {features.shape[1] // 2}


def test_time_reduction_shows_in_the_frames() -> None:
    conv = parse_conv_layers("[(8,10,5),(8,1,1)] + [(8,3,2)] * 4 + [(8,1,1)] + [(8,2,2)] * 2")  # FitHuBERT's
    config = changed(conv_layers=conv, time_reduction=2)
    assert (config.frame_stride, config.receptive_field) == (640, 720)
    assert [config.num_frames(n) for n in (719, 720, 1359, 1360, 16_000)] == [0, 1, 1, 2, 24]
    assert config.num_feature_frames(16_000) == 49
    encoder = SpeechEncoder(config)
    with pytest.raises(ValueError, match="at least 720 samples"):
        encoder(torch.randn(1, 719))
    assert encoder(torch.randn(1, 720)).x.shape == (1, 1, 16)
    # masks are drawn on the extractor's frames, which teachers have too
    encoder.masking = dataclasses.replace(encoder.masking, mask_prob=0.5, mask_length=2)
    masked = encoder.draw_masks(torch.randn(1, 16_000), None, [[1]])
    assert masked.shape == (1, 49)
    assert encoder(torch.randn(1, 16_000), masked=masked).masked.shape == (1, 49)


# sharing


@pytest.mark.parametrize(
    ("shared", "group", "owners"),
    [("all", 0, (0, 0, 0, 0)), ("all", 2, (0, 0, 2, 2)), ("attention", 3, (0, 0, 0, 3)), ("ffn", 0, (0, 0, 0, 0))],
)
@pytest.mark.parametrize("base", [PLAIN, PRE_LN], ids=["post_ln", "pre_ln"])
def test_shared_layers_are_copies_of_their_owner(
    base: EncoderConfig, shared: str, group: int, owners: tuple[int, ...]
) -> None:
    """An unshared encoder with the parameters copied computes the same, and its gradients add up to the shared ones."""
    encoder, copies = new_encoder(changed(base, shared=shared, shared_group=group)), SpeechEncoder(base).eval()
    parts = {"all": "", "attention": "self_attn.", "ffn": "fc"}[shared]
    origin = {}
    for key in copies.state_dict():
        head, _, rest = key.partition("encoder.layers.")
        number, _, name = rest.partition(".")
        is_shared = rest and not head and name.startswith(parts)
        origin[key] = f"encoder.layers.{owners[int(number)]}.{name}" if is_shared else key
    own = encoder.state_dict()
    assert set(own) == set(origin.values())
    copies.load_state_dict({key: own[source] for key, source in origin.items()})
    source, padding_mask = make_batch([700, 500])
    ours, theirs = encoder(source, padding_mask), copies(source, padding_mask)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    ours.x.square().sum().backward()
    theirs.x.square().sum().backward()
    sums = {key: torch.zeros_like(value) for key, value in own.items()}
    for key, parameter in copies.named_parameters():
        if parameter.grad is not None:
            sums[origin[key]] += parameter.grad
    for key, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, sums[key], rtol=1e-4, atol=1e-4), key


# windows and Linformer


def masked_full_attention(attention: SelfAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """Attention over the pairs that ``allowed`` [T, T] names, query by query; x [T, C]."""
    q, k, v = (getattr(attention, f"{n}_proj")(x).view(len(x), attention.num_heads, -1) for n in "qkv")
    rows = []
    for t in range(len(x)):
        keys = allowed[t].nonzero()[:, 0]
        scores = torch.einsum("hd,shd->hs", q[t], k[keys]) * attention.head_dim**-0.5
        rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[keys]).flatten())
    return attention.out_proj(torch.stack(rows))


@pytest.mark.parametrize(("window", "num_global"), [(1, 0), (5, 0), (5, 3), (20, 0), (20, 4), (3, 20)])
@torch.no_grad()
def test_windows_are_masked_full_attention(window: int, num_global: int) -> None:
    torch.manual_seed(0)
    attention = WindowedAttention(16, 2, 8, window=window, num_global=num_global).double().eval()
    for frames, valid in ((150, 150), (150, 101), (33, 33), (12, 7)):
        x = torch.randn(2, frames, 16, dtype=torch.float64)
        mask = (
            None
            if valid == frames
            else torch.arange(frames)[None, None, None, :] < torch.tensor([frames, valid])[:, None, None, None]
        )
        out = attention(x, mask)
        assert out.isfinite().all()
        for row, length in enumerate((frames, valid)):
            index = torch.arange(length)
            near = (index[:, None] - index).abs() <= window
            allowed = near | (index < num_global) | (index < num_global)[:, None]
            assert_close(out[row, :length], masked_full_attention(attention, x[row, :length], allowed), 1e-10)
    blocked = [frames for frames in (150, 33, 12) if num_pairs(frames, window, num_global) < frames**2]
    assert blocked, "the blocks themselves must have been used"


def test_windows_cost_less_than_all_pairs_and_grow_linearly() -> None:
    assert num_pairs(1500, 50, 1) < 0.12 * 1500**2
    assert num_pairs(3000, 50, 1) == pytest.approx(2 * num_pairs(1500, 50, 1), rel=0.01)
    assert num_pairs(20, 50, 1) == 400  # short utterances: all pairs, and no more


@torch.no_grad()
def test_linformer_attends_to_projected_frames() -> None:
    encoder = make_encoder("linformer")
    attention = encoder.encoder.layers[0].self_attn
    x, length = torch.randn(2, 40, 16), 25
    mask = torch.arange(40)[None, None, None, :] < torch.tensor([40, length])[:, None, None, None]
    out = attention(x, mask)
    for row, frames in enumerate((40, length)):
        q, k, v = (getattr(attention, f"{n}_proj")(x[row, :frames]).view(frames, 4, 4) for n in "qkv")
        heads = []
        for h in range(4):
            keys = attention.key_frames[:, :frames] @ k[:, h]  # [k, D]
            values = attention.value_frames[:, :frames] @ v[:, h]
            heads.append((q[:, h] @ keys.T / 4**0.5).softmax(-1) @ values)
        assert_close(out[row, :frames], attention.out_proj(torch.cat(heads, -1)))
    assert attention.key_frames.shape == (6, 400)


def test_linformer_refuses_what_is_longer() -> None:
    with pytest.raises(
        ValueError, match=r"`linformer_max_frames` = 400 frames \(0.5 s\), but the longest has 449; crop or drop"
    ):
        make_encoder("linformer")(torch.randn(1, 9000))


# attention maps


@pytest.mark.parametrize("base", [PLAIN, PRE_LN, WAVLM], ids=["post_ln", "pre_ln", "wavlm"])
@torch.no_grad()
def test_a_reused_map_is_that_of_the_layer_before(base: EncoderConfig) -> None:
    """Layers that compute the same map from their own input are found by giving them the source's input by hand."""
    encoder = new_encoder(reusing(base, 1, 2))
    source, padding_mask = make_batch([700, 500])
    out = encoder(source, padding_mask)
    layers, mask = encoder.encoder.layers, ~out.padding_mask[:, None, None, :]
    bias = encoder.encoder.relative_attention_bias
    position = None if bias is None else bias(out.x.shape[1])
    scores = layers[0].attention_map(out.hidden_states[0], mask, position)
    assert torch.allclose(scores.sum(-1), torch.ones(scores.shape[:3]), atol=1e-5)
    assert bool((scores.masked_select((~mask).expand_as(scores)) == 0).all())
    for i in (1, 2):
        assert layers[i].self_attn.q_proj is None and layers[i].self_attn.k_proj is None
        x, attention = out.hidden_states[i], layers[i].self_attn
        inner = layers[i].self_attn_layer_norm(x) if base.layer_norm_first else x
        context = torch.einsum("bhts,bshd->bthd", scores, attention.v_proj(inner).unflatten(-1, (4, -1)))
        x = x + attention.out_proj(context.flatten(2))
        if not base.layer_norm_first:
            x = layers[i].self_attn_layer_norm(x)
        inner = layers[i].final_layer_norm(x) if base.layer_norm_first else x
        x = x + layers[i].fc2(F.gelu(layers[i].fc1(inner)))
        expected = x if base.layer_norm_first else layers[i].final_layer_norm(x)
        assert_close(out.hidden_states[i + 1], expected)
    # layer 3 computes its own again, and the source itself computes what it would alone
    assert layers[3].self_attn.q_proj is not None
    alone = SpeechEncoder(base).eval()
    alone.load_state_dict(encoder.state_dict(), strict=False)
    assert_close(out.hidden_states[1], alone(source, padding_mask).hidden_states[1])


def test_a_skipped_layer_still_gives_its_map() -> None:
    encoder = new_encoder(reusing(PLAIN, 1, 2, 3), TrainingConfig(layerdrop=0.5)).train()
    source, _ = make_batch([700])
    seed = next(s for s in range(100) if torch.rand((), generator=torch.Generator().manual_seed(s)) < 0.5)
    torch.manual_seed(seed)
    out = encoder(source)
    assert torch.equal(out.hidden_states[1], out.hidden_states[0])  # layer 0 was skipped
    q_proj = encoder.encoder.layers[0].self_attn.q_proj
    torch.manual_seed(seed)
    with torch.no_grad():
        q_proj.weight.mul_(3)
        other = encoder(source)
    assert not torch.allclose(other.x, out.x)  # and its map was applied behind it


# errors and options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: separated(PLAIN, 0), r"conv layer 0 cannot be `separable`.*one input channel"),
        (lambda: changed(time_reduction=0), r"`time_reduction`.*at least 1, but is 0"),
        (lambda: changed(shared="some"), r"`shared` must be one of none, all, attention, ffn, but is 'some'"),
        (lambda: changed(shared_group=2), r"`shared_group`.*is 2 where `shared` is none"),
        (lambda: changed(shared="all", shared_group=1), r"0 \(all layers are one group\) or from 2 to .* 4, but is 1"),
        (lambda: changed(shared="ffn", shared_group=5), r"but is 5"),
        (
            lambda: changed(VARIANTS["reused_unequal"], shared="ffn"),
            r"`shared` = ffn\) must have the same shape, but layer 3",
        ),
        (lambda: changed(attention="sparse"), r"`attention` must be one of full, windowed, linformer, but is 'sparse'"),
        (lambda: changed(attention="windowed"), r"`attention_window` must be at least 1 frame.*are 0 and 0"),
        (
            lambda: changed(attention_window=4),
            r"`attention_window` belongs to `attention` = windowed, but is 4 with full",
        ),
        (lambda: changed(attention="windowed", attention_window=4, linformer_dim=3), r"`linformer_dim` belongs to"),
        (lambda: changed(attention="linformer", linformer_dim=9), r"from 1 to `linformer_max_frames`.*are 9 and 0"),
        (
            lambda: changed(WAVLM, attention="windowed", attention_window=4),
            r"windowed cannot have WavLM's position bias",
        ),
        (lambda: reusing(PLAIN, 0), r"layer 0 must have an earlier layer whose attention map"),
        (
            lambda: reusing(changed(shared="all"), 1),
            r"`reuses_attention` of layer 1 cannot be combined with `shared` = all",
        ),
        (lambda: reusing(VARIANTS["windowed"], 1), r"`reuses_attention` of layer 1 needs.*`attention` is windowed"),
        (lambda: reusing(VARIANTS["reused_unequal"], 4), r"layer 4 applies the attention map of layer 3.*has 2"),
        (lambda: reusing(VARIANTS["reused_unequal"], 2), r"layer 2 must have attention to reuse a map"),
    ],
)
def test_contradictions_are_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_options_of_a_student_from_scratch() -> None:
    options = {
        **{"encoder_layers": 4, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4},
        **{"separable_conv_layers": [1, 2], "time_reduction": 2, "shared": "ffn", "shared_group": 2},
        "reuse_attention_layers": [1, 3],
    }
    config = config_from_options(options, "ssl_student")
    assert [c.separable for c in config.conv_layers] == [False, True, True, False, False, False, False]
    assert (config.time_reduction, config.shared, config.shared_group, config.frame_stride) == (2, "ffn", 2, 640)
    assert [layer.reuses_attention for layer in config.layers] == [False, True, False, True]
    windowed = config_from_options(
        {"attention": "windowed", "attention_window": 50, "attention_global": 1}, "ssl_student"
    )
    assert (windowed.attention, windowed.attention_window, windowed.attention_global) == ("windowed", 50, 1)
    linformer = config_from_options(
        {"attention": "linformer", "linformer_dim": 64, "linformer_max_frames": 800}, "ssl_student"
    )
    assert (linformer.linformer_dim, linformer.linformer_max_frames) == (64, 800)
    for option, value in (("separable_conv_layers", [7]), ("reuse_attention_layers", [1, 1])):
        with pytest.raises(ValueError, match=rf"`{option}` must name different layers, 0 to .*counted from 0"):
            config_from_options({option: value}, "ssl_student")
    # every option changes something, and other models know none of them
    assert config_from_options({}, "ssl_student") == config_from_options(dict(VARIANT_OPTIONS), "ssl_student")
    assert config_from_options({"time_reduction": 2}, "hubert").time_reduction == 1
