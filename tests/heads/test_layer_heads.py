"""Layer-prediction heads: which layers they read, what they share, how they start."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.heads import HeadsConfig, LayerHeads, least_squares, parse_pairs

PAIRS = ((0, 0), (2, 4), (3, 8), (3, 12))


def config(
    student_dim: int = 6, teacher_dim: int = 6, pairs: tuple[tuple[int, int], ...] = PAIRS, **kw: str
) -> HeadsConfig:
    return HeadsConfig(pairs, student_dim, teacher_dim, num_student_layers=3, **kw)


def states(dim: int, num_layers: int, seed: int, batch: int = 3, frames: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, frames, dim, generator=generator) for _ in range(num_layers + 1)]


@pytest.mark.parametrize("sharing", ["own", "shared"])
@pytest.mark.parametrize("dims", [(6, 6), (4, 6), (6, 4)])
def test_identity_hands_the_students_channels_on(dims: tuple[int, int], sharing: str) -> None:
    heads = LayerHeads(config(*dims, sharing=sharing))
    hidden = states(dims[0], 3, seed=0)
    predictions = heads(hidden)
    common = min(dims)
    for (student, _), prediction in zip(PAIRS, predictions, strict=True):
        assert prediction.shape == (3, 20, dims[1])
        torch.testing.assert_close(prediction[..., :common], hidden[student][..., :common])
        assert (prediction[..., common:] == 0).all()


def test_sharing() -> None:
    shared, own = LayerHeads(config(sharing="shared")), LayerHeads(config(sharing="own"))
    assert len(shared.linears) == 2 and len(own.linears) == 4
    assert shared.linear_of_pair == [0, 1, 1, 1] and own.linear_of_pair == [0, 1, 2, 3]
    assert set(shared.state_dict()) == {f"linears.{i}.{p}" for i in range(2) for p in ("weight", "bias")}
    without_zero = LayerHeads(config(pairs=((1, 1), (3, 12))))
    assert len(without_zero.linears) == 1
    hidden = states(6, 3, seed=1)
    before = shared(hidden)
    torch.nn.init.zeros_(shared.linears[1].weight)
    after = shared(hidden)
    assert torch.equal(after[0], before[0]) and not any(p.any() for p in after[1:])


def test_predlayer_is_distilhuberts_head() -> None:
    torch.manual_seed(0)
    heads = LayerHeads(config(4, 6, mode="predlayer", pairs=((0, 4), (1, 8), (3, 12))))
    hidden = states(4, 3, seed=2)
    assert heads.pairs == ((3, 4), (3, 8), (3, 12)) and heads.deepest_layer == 3
    assert heads.hidden is not None
    for i, prediction in enumerate(heads(hidden)):
        weight, bias = heads.hidden.weight[4 * i : 4 * i + 4], heads.hidden.bias[4 * i : 4 * i + 4]
        inner = F.gelu(F.linear(hidden[3], weight, bias))
        torch.testing.assert_close(prediction, F.linear(inner, heads.linears[i].weight, heads.linears[i].bias))
    before = heads(hidden)
    hidden[0], hidden[1] = hidden[0] + 1, hidden[1] + 1  # the student layers of the pairs are not read
    assert all(torch.equal(a, b) and a.shape == (3, 20, 6) for a, b in zip(heads(hidden), before, strict=True))
    published = HeadsConfig(((2, 4), (2, 8), (2, 12)), 768, 768, num_student_layers=2, mode="predlayer")
    with torch.device("meta"):
        assert sum(p.numel() for p in LayerHeads(published).parameters()) == 3_543_552  # 3.54M in the paper's model


def test_deepest_layer() -> None:
    heads = LayerHeads(config(pairs=((0, 0), (2, 8))))
    assert heads.deepest_layer == 2 and heads.pairs == ((0, 0), (2, 8))
    assert len(heads(states(6, 2, seed=0))) == 2  # deeper hidden states need not be there


@pytest.mark.parametrize("sharing", ["own", "shared"])
def test_least_squares_recovers_affine_maps(sharing: str) -> None:
    heads = LayerHeads(config(5, 7, sharing=sharing, init="least_squares"))
    student = states(5, 3, seed=3)
    generator = torch.Generator().manual_seed(4)
    maps = [(torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)) for _ in range(2)]
    teacher = [torch.full((3, 20, 7), float("nan"))] * 13
    padding_mask = torch.arange(20) >= torch.tensor([20, 15, 9])[:, None]
    for student_layer, teacher_layer in PAIRS[:3]:
        weight, bias = maps[int(student_layer > 0)]
        teacher[teacher_layer] = F.linear(student[student_layer], weight, bias)
        teacher[teacher_layer][padding_mask] = float("nan")  # padded frames must not be read
    teacher[12] = teacher[8]
    heads.fit_least_squares(student, teacher, padding_mask)
    for (_, teacher_layer), prediction in zip(PAIRS, heads(student), strict=True):
        torch.testing.assert_close(
            prediction[~padding_mask], teacher[teacher_layer][~padding_mask], atol=1e-3, rtol=1e-3
        )


def test_least_squares_matches_lstsq_and_survives_degenerate_frames() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(60, 4, generator=generator), torch.randn(60, 3, generator=generator)
    weight, bias = least_squares(x, y, ridge=1e-12)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1)], 1).double(), y.double()).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), solution, atol=1e-8, rtol=1e-8)
    x[:, 1] = 0.0  # a dead channel
    assert least_squares(x, y)[0].isfinite().all()
    few, _ = least_squares(x[:2], y[:2])  # fewer frames than channels
    assert few.isfinite().all()
    weight, bias = least_squares(torch.ones(9, 4), y[:9])  # constant input: the mean is the best there is
    assert weight.abs().max() < 1e-6
    torch.testing.assert_close(bias + weight.sum(1), y[:9].double().mean(0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 1e3))
def test_least_squares_is_a_minimum(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64) * scale
    y = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    weight, bias = least_squares(x, y, ridge=1e-10)
    best = (x @ weight.T + bias - y).square().sum()
    step = torch.randn(3, 4, generator=generator, dtype=torch.float64) * 0.01 / scale
    for other in (weight + step, weight - step):
        assert (x @ other.T + bias - y).square().sum() >= best * (1 - 1e-9)


def test_gradients_reach_student_and_heads() -> None:
    heads = LayerHeads(config())
    hidden = [h.requires_grad_() for h in states(6, 3, seed=6)]
    sum(p.square().sum() for p in heads(hidden)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters())
    assert hidden[2].grad is not None and hidden[1].grad is None  # layer 1 is in no pair


def test_load_matching() -> None:
    one, other = LayerHeads(config(init="default")), LayerHeads(config())
    assert other.load_matching(one.state_dict()) and torch.equal(one.linears[1].weight, other.linears[1].weight)
    narrow = LayerHeads(config(5, 6))
    before = narrow.linears[0].weight.clone()
    assert not narrow.load_matching(one.state_dict()) and not narrow.load_matching({})
    assert not narrow.load_matching(LayerHeads(config(5, 6, sharing="own")).state_dict())
    assert torch.equal(narrow.linears[0].weight, before)


def test_config_survives_json() -> None:
    original = config(4, 6, sharing="own", init="least_squares")
    assert HeadsConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]; known are .*'teacher_dim'"):
        HeadsConfig.from_dict({**original.to_dict(), "colour": 1})


def test_parse_pairs() -> None:
    assert parse_pairs("0,4, 8,12") == ((0, 0), (4, 4), (8, 8), (12, 12))
    assert parse_pairs("0:0, 2:4,3") == ((0, 0), (2, 4), (3, 3))
    for text, item in (("", "''"), ("0,x", "'x'"), ("1:2:3", "'1:2:3'"), ("4:", "'4:'")):
        with pytest.raises(ValueError, match=rf"must read like '0,4,8,12' or .*{item} is no layer"):
            parse_pairs(text)


def test_errors() -> None:
    for name, value, valid in (
        ("mode", "last", "layer2layer, predlayer"),
        ("init", "zero", "identity"),
        ("sharing", "all", "own"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` of the heads must be one of {valid}.*'{value}'"):
            config(**{name: value})
    with pytest.raises(ValueError, match="the pair 4:12 names layer 4 of the student, which has layers 0 to 3 only"):
        config(pairs=((0, 0), (4, 12)))
    with pytest.raises(ValueError, match="the pair 3:8 names layer 8 of the teacher, which has layers 0 to 6 only"):
        config().check_teacher(6)
    config().check_teacher(12)
    for pairs in ((), ((0, -1),)):
        with pytest.raises(ValueError, match="`pairs` must hold one or more"):
            config(pairs=pairs)
    with pytest.raises(ValueError, match="must differ"):
        config(pairs=((0, 4), (1, 4)), mode="predlayer")
    with pytest.raises(ValueError, match="cannot be least_squares"):
        config(mode="predlayer", init="least_squares")
    with pytest.raises(RuntimeError, match="no least-squares solution"):
        LayerHeads(config(mode="predlayer")).fit_least_squares(states(6, 3, 0), states(6, 12, 1))
    with pytest.raises(ValueError, match="at least one, but got 0 and 0"):
        LayerHeads(config()).fit_least_squares(states(6, 3, 0), states(6, 12, 1), torch.ones(3, 20, dtype=torch.bool))


def test_without_heads_hidden_states_are_the_predictions() -> None:
    heads = LayerHeads(config(mode="none"))
    hidden = states(6, 3, seed=7)
    assert heads.state_dict() == {} and heads.pairs == PAIRS and heads.deepest_layer == 3
    assert all(torch.equal(p, hidden[s]) for (s, _), p in zip(PAIRS, heads(hidden), strict=True))
    with pytest.raises(ValueError, match=r"same width, but have 6 and 8; take mode layer2layer or predlayer"):
        config(6, 8, mode="none")
    with pytest.raises(ValueError, match="time reduction leaves one of 2; take mode layer2layer"):
        config(mode="none", upsample=2)
    with pytest.raises(RuntimeError, match="`none` have no least-squares"):
        heads.fit_least_squares(hidden, hidden)


@pytest.mark.parametrize("mode", ["layer2layer", "predlayer"])
def test_upsampling_heads_make_frames_of_one_frame(mode: str) -> None:
    """FitHuBERT's: a transposed convolution whose kernel is its stride makes r frames of each, from nothing but that frame."""
    torch.manual_seed(0)
    heads = LayerHeads(config(4, 6, mode=mode, sharing="own", init="default", upsample=3))
    assert len(heads.upsamplers) == (4 if mode == "layer2layer" else 1)
    hidden = states(4, 3, seed=8)
    before = heads(hidden)
    assert all(p.shape == (3, 60, 6) for p in before)
    for state in hidden:
        state[:, 5] += 1
    for old, new in zip(before, heads(hidden), strict=True):
        changed = (old != new).any(-1).all(0).nonzero().flatten().tolist()
        assert changed == [15, 16, 17]
    if mode == "layer2layer":
        upsampler, linear = heads.upsamplers[2], heads.linears[2]
        frame = hidden[3][:, 5]  # [B, C]
        for tap in range(3):
            expected = linear(frame @ upsampler.weight[:, :, tap] + upsampler.bias)
            torch.testing.assert_close(heads(hidden)[2][:, 15 + tap], expected)


def test_identity_repeats_frames() -> None:
    heads = LayerHeads(config(upsample=2))
    hidden = states(6, 3, seed=9)
    for (student, _), prediction in zip(PAIRS, heads(hidden), strict=True):
        torch.testing.assert_close(prediction, hidden[student].repeat_interleave(2, 1))
    with pytest.raises(ValueError, match="cannot be least_squares unless they are one Linear per frame"):
        config(init="least_squares", upsample=2)
