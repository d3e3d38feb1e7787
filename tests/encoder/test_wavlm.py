"""WavLM: the gated relative position bias, the released files, and every layer against `transformers`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.encoder.attention import SelfAttention
from s3distill.encoder.checkpoint import config_from_options, parse_checkpoint
from s3distill.encoder.config import EncoderConfig, LayerConfig
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.position_bias import (
    RelativePositionBias,
    additive_mask,
    position_gate,
    relative_position_buckets,
)
from s3distill.encoder.teacher import Teacher
from tests.encoder import folders
from tests.encoder.test_parity import TOLERANCE, error, utterances

SMALL_LARGE = (
    folders.LARGE_CFG
    | folders.SMALL_CFG
    | {
        **{"extractor_mode": "layer_norm", "layer_norm_first": True, "normalize": True},
    }
)


def load(cfg: dict[str, Any], seed: int = 0) -> tuple[SpeechEncoder, nn.Module]:
    """Our encoder and `transformers`' with the weights of one released file."""
    state = folders.released_wavlm(cfg, seed)
    model = folders.into_transformers(state["model"], folders.wavlm_for(cfg))
    parsed = parse_checkpoint(state)
    encoder = SpeechEncoder(parsed.config).eval()
    encoder.load_encoder_state(parsed.encoder_state)
    return encoder, model


@torch.no_grad()
def worst_error(encoder: SpeechEncoder, model: nn.Module, lengths: list[int]) -> float:
    source, padding_mask = utterances(lengths)
    out = encoder(source, padding_mask)
    errors = []
    for i, length in enumerate(lengths):
        states, x = folders.reference(model, source[i : i + 1, :length])
        assert len(out.hidden_states) == len(states)
        errors += [error(ours[i, : len(x)], theirs) for ours, theirs in zip(out.hidden_states, states, strict=True)]
        errors.append(error(out.x[i, : len(x)], x))
    return max(errors)


REAL_SHAPES = [
    pytest.param(folders.BASE_CFG, id="base"),  # Base+ has the same shape
    pytest.param(folders.LARGE_CFG | {"encoder_layers": 12}, id="large"),
]


@pytest.mark.slow
@pytest.mark.parametrize("cfg", REAL_SHAPES)
def test_every_layer_is_that_of_transformers_at_real_widths(cfg: dict, record_property: Any) -> None:
    worst = worst_error(*load(cfg), [16000, 9700])
    record_property("worst_error", worst)
    print(f"wavlm: {worst:.2e}")
    assert worst <= TOLERANCE


SMALL_SHAPES = [pytest.param(folders.SMALL_CFG, id="post_ln"), pytest.param(SMALL_LARGE, id="pre_ln")]


@pytest.mark.parametrize("cfg", SMALL_SHAPES)
def test_every_layer_is_that_of_transformers_in_a_small_shape(cfg: dict) -> None:
    assert worst_error(*load(cfg), [16000, 400, 9000, 12345, 719]) <= TOLERANCE


def test_beyond_the_largest_distance() -> None:
    """17.6 s have distances above 800 frames, which all share a bucket in each direction."""
    encoder, model = load(folders.SMALL_CFG)
    assert encoder.config.num_frames(281_600) > 860
    assert worst_error(encoder, model, [281_600]) <= TOLERANCE


def test_another_table_or_gate_gives_another_result() -> None:
    for name in ("encoder.relative_attention_bias.weight", "encoder.layers.2.self_attn.grep_a"):
        encoder, model = load(folders.SMALL_CFG)
        encoder.get_parameter(name).data.mul_(1.1)
        assert worst_error(encoder, model, [9000]) > 10 * TOLERANCE


# --- the equations


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """One distance at a time, in double precision."""
    half = num_buckets // 2
    exact = half // 2
    base = half if distance > 0 else 0
    if abs(distance) < exact:
        return base + abs(distance)
    share = math.log(abs(distance) / exact) / math.log(max_distance / exact)
    return base + min(half - 1, exact + int(share * (half - exact)))


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (32, 100), (4, 5), (64, 777)])
def test_buckets_are_a_loop(num_buckets: int, max_distance: int) -> None:
    distances = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    ours = relative_position_buckets(distances, num_buckets, max_distance)
    assert ours.tolist() == [bucket(d, num_buckets, max_distance) for d in distances.tolist()]
    assert ours.min() >= 0 and ours.max() == num_buckets - 1


@pytest.mark.parametrize("num_frames", [1, 2, 7, 900])
def test_the_table_is_laid_out_by_distance(num_frames: int) -> None:
    torch.manual_seed(0)
    table = RelativePositionBias(320, 800, 2)
    distance = torch.arange(num_frames)[None, :] - torch.arange(num_frames)[:, None]  # key - query
    expected = table.weight[relative_position_buckets(distance, 320, 800)].permute(2, 0, 1)
    assert torch.equal(table(num_frames), expected)
    probe = torch.randn(expected.shape)
    (ours,) = torch.autograd.grad((table(num_frames) * probe).sum(), table.weight)
    (theirs,) = torch.autograd.grad((expected * probe).sum(), table.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def naive_attention(
    attention: SelfAttention, x: Tensor, table: Tensor, valid: int, heads: tuple[int, ...], num_heads: int
) -> Tensor:
    """One head, query and key at a time, as the paper writes it; x [T, C]."""
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    width, frames = attention.head_dim, len(x)
    weight, offset = attention.grep_linear.weight, attention.grep_linear.bias
    contexts = []
    for h, head in enumerate(heads):
        part = slice(h * width, (h + 1) * width)
        rows = []
        for i in range(frames):
            own = x[i].view(num_heads, -1)[head]
            a = torch.sigmoid(own @ weight[:4].sum(0) + offset[:4].sum())
            reset = torch.sigmoid(own @ weight[4:].sum(0) + offset[4:].sum())
            update = 1 - a
            scores = []
            for j in range(valid):
                d = table[bucket(j - i, len(table), 800), head]
                gated = d + update * d + (1 - update) * attention.grep_a[0, h, 0, 0] * reset * d
                scores.append(q[i, part] @ k[j, part] / math.sqrt(width) + gated)
            rows.append(torch.softmax(torch.stack(scores), 0) @ v[:valid, part])
        contexts.append(torch.stack(rows))
    return attention.out_proj(torch.cat(contexts, -1))


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (1, 3), (2,)])
@torch.no_grad()
def test_attention_is_the_papers_loop(heads: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, len(heads), 5, position_heads=heads, num_position_heads=4).double().eval()
    for parameter in attention.parameters():
        parameter.normal_()
    table = RelativePositionBias(320, 800, 4).double()
    table.weight.normal_(std=2)
    x, num_valid = torch.randn(2, 6, 16).double(), [6, 4]
    mask = (torch.arange(6) < torch.tensor(num_valid)[:, None])[:, None, None, :]
    ours = attention(x, mask, position_bias=table(6))
    for row, valid in enumerate(num_valid):
        expected = naive_attention(attention, x[row], table.weight, valid, heads, 4)
        torch.testing.assert_close(ours[row], expected)
    unmasked = attention(x[:1], None, position_bias=table(6))
    torch.testing.assert_close(unmasked, ours[:1])


def test_gate_gradients() -> None:
    torch.manual_seed(0)
    projected = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(4) < 3)[None, None, None, :]
    assert torch.autograd.gradcheck(position_gate, (projected, scale))

    def attended(projected: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return additive_mask(position_gate(projected, scale), bias, mask, torch.float64).softmax(-1)

    assert torch.autograd.gradcheck(attended, (projected, scale, bias))


def test_a_masked_key_stays_masked_whatever_the_gate() -> None:
    gate = torch.tensor([-5.0, 0.0, 3.0]).view(1, 1, 3, 1)  # -inf put in front of the gate would become inf or NaN
    mask = additive_mask(gate, torch.ones(1, 3, 3), torch.tensor([True, False, True]).view(1, 1, 1, 3), torch.float32)
    assert torch.equal(mask[0, 0, :, 1], torch.full((3,), -torch.inf))
    assert torch.equal(mask[0, 0, :, 0], gate.flatten())


@torch.no_grad()
def test_the_bias_is_computed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse_checkpoint(folders.released_wavlm())
    encoder = SpeechEncoder(parsed.config).eval()
    calls: list[int] = []
    stock = RelativePositionBias.forward
    monkeypatch.setattr(RelativePositionBias, "forward", lambda self, n: calls.append(n) or stock(self, n))
    out = encoder(torch.randn(2, 9000))
    assert calls == [out.x.shape[1]] and parsed.config.num_layers == 3
    assert sum("relative_attention_bias" in name for name, _ in encoder.named_parameters()) == 1


# --- files


@pytest.mark.parametrize("cfg", SMALL_SHAPES)
def test_a_released_file_loads(cfg: dict, tmp_path: Path) -> None:
    state = folders.released_wavlm(cfg)
    torch.save(state, tmp_path / "WavLM.pt")
    model = folders.into_transformers(state["model"], folders.wavlm_for(cfg))
    loaded = s3distill.load(tmp_path / "WavLM.pt")
    assert (loaded.family, loaded.normalize, loaded.head) == ("wavlm", cfg["normalize"], None)
    source, lengths = 4 * utterances([9000, 4000])[0] + 0.3, [9000, 4000]
    with torch.no_grad():
        out = loaded(source, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        single = source[i : i + 1, :length]
        if cfg["normalize"]:
            single = nn.functional.layer_norm(single, (length,))
        states, x = folders.reference(model, single)
        for ours, theirs in zip(out.hidden_states, states, strict=True):
            assert error(ours[i, : len(x)], theirs) <= TOLERANCE


def test_the_options_of_the_released_models() -> None:
    base, large = (config_from_options(cfg, "wavlm") for cfg in (folders.BASE_CFG, folders.LARGE_CFG))
    assert (base.position_buckets, base.position_max_distance, base.position_heads) == (320, 800, 12)
    assert (large.position_heads, large.layer_norm_first, large.extractor_mode) == (16, True, "layer_norm")
    assert base.layers[5] == LayerConfig(12, 64, 3072, position_heads=tuple(range(12)))
    assert EncoderConfig.from_json(large.to_json()) == large


def test_a_teacher_in_half_precision_and_in_part() -> None:
    parsed = parse_checkpoint(folders.released_wavlm())
    source, padding_mask = utterances([9000, 5000])
    exact, _ = Teacher(parsed).hidden_states(source, padding_mask, [0, 2])
    rounded, mask = Teacher(parsed, "bfloat16").hidden_states(source, padding_mask, [0, 2])
    for ours, theirs in zip(rounded, exact, strict=True):
        assert error(ours[~mask], theirs[~mask]) < 0.05


def test_a_file_without_its_table_is_named(tmp_path: Path) -> None:
    state = folders.released_wavlm()
    del state["model"]["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    torch.save(state, tmp_path / "WavLM.pt")
    with pytest.raises(
        ValueError, match=r"WavLM\.pt does not fit .* missing: \['encoder\.relative_attention_bias\.weight'\]"
    ):
        s3distill.load(tmp_path / "WavLM.pt")


def test_a_bias_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="`gru_rel_pos` = False is not supported"):
        parse_checkpoint(folders.released_wavlm() | {"cfg": {**folders.SMALL_CFG, "gru_rel_pos": False}})


def test_without_a_bias_it_is_a_plain_encoder() -> None:
    config = config_from_options({**folders.SMALL_CFG, "relative_position_embedding": False}, "wavlm")
    assert config == config_from_options(folders.SMALL_CFG | {"relative_position_embedding": None}, "hubert")
    assert not any("grep" in name or "relative" in name for name, _ in SpeechEncoder(config).named_parameters())


def test_a_config_of_before_position_biases_loads() -> None:
    config = config_from_options({}, "wav2vec2")
    values = json.loads(config.to_json())
    for name in ("position_buckets", "position_max_distance", "position_heads"):
        del values[name]
    for layer in values["layers"]:
        del layer["position_heads"]
    assert EncoderConfig.from_json(json.dumps(values)) == config


FAULTS = [
    ({"position_buckets": 0}, r"without `position_buckets` .* but is 4 and set in layers \[0, 1, 2\]"),
    ({"position_buckets": 3}, "`position_buckets` must be 0 or at least 4"),
    ({"position_max_distance": 80}, "more than a quarter of it, but they are 320 and 80"),
    ({"position_heads": 5}, r"`embed_dim` \(32\) must be a multiple of `position_heads`"),
    ({"position_heads": 2}, "`position_heads` of layer 0 must name a different column of the position bias, 0 to 1"),
    ({"layers": (LayerConfig(4, 8, 48),)}, "for each of its 4 heads, but is None"),
    ({"layers": (LayerConfig(2, 8, 48, position_heads=(1, 1)),)}, r"for each of its 2 heads, but is \(1, 1\)"),
    ({"layers": (LayerConfig(1, 8, 48, position_heads=(1, 2)),)}, r"for each of its 1 heads, but is \(1, 2\)"),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_impossible_biases_are_refused(changes: dict, message: str) -> None:
    config = config_from_options(folders.SMALL_CFG, "wavlm")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_a_student_from_scratch_may_have_a_bias() -> None:
    from omegaconf import OmegaConf

    from s3distill.models.ssl_student import SslStudent, SslStudentConfig

    options = {**folders.checkpoints.SMALL, "relative_position_embedding": True, "num_buckets": 16, "max_distance": 40}
    cfg = OmegaConf.structured(SslStudentConfig(**options, prune_units=["head"], normalize=False, seed=1))
    student = SslStudent.build_model(cfg, task=object())
    assert (student.config.position_buckets, student.config.position_max_distance) == (16, 40)
    student.extract_features(torch.randn(2, 9000), None)["x"].square().sum().backward()
    for name in ("encoder.relative_attention_bias.weight", "encoder.layers.1.self_attn.grep_a"):
        assert student.get_parameter(name).grad.abs().sum() > 0


@torch.no_grad()
def test_it_exports_with_any_length() -> None:
    """`torch.export`, on which ONNX builds, must not fix the number of frames that the bias is laid out for."""
    config = config_from_options(folders.SMALL_CFG | {"encoder_layers": 1}, "wavlm")
    encoder = SpeechEncoder(config).eval()

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, source: Tensor) -> Tensor:
            return self.encoder(source).x

    dynamic = {"source": {1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Output(), (torch.randn(1, 9000),), dynamic_shapes=dynamic)
    longer = torch.randn(1, 20_000)
    torch.testing.assert_close(program.module()(longer), encoder(longer).x)


def test_stock_fairseq_says_what_to_do_with_a_released_file(tmp_path: Path) -> None:
    from fairseq import checkpoint_utils

    torch.save(folders.released_wavlm(), tmp_path / "WavLM.pt")
    with pytest.raises(ValueError, match=r"is a WavLM in its own layout.*s3distill convert .*WavLM\.pt model\.pt"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "WavLM.pt"))
    assert compat.load_checkpoint(tmp_path / "WavLM.pt")["cfg"]["gru_rel_pos"] is True
