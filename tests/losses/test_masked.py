"""Masked distillation: which frames count, with which target and weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.losses import FrameWeights, LossWeights, hidden_state_loss, masked_hidden_state_loss

WEIGHTS = LossWeights(l1=0.7, l2=1.3, cosine=2.0)
LIGHTHUBERT, ARMHUBERT = FrameWeights(1.0, 0.0), FrameWeights(1.0, 1.0)


def case(lengths: list[int], seed: int = 0, channels: int = 5) -> tuple[torch.Tensor, ...]:
    """Prediction, clean and masked target, mask, padding mask; every first frame is masked, every second is not."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), channels)
    p, h, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    masked = torch.rand(shape[:2], generator=generator) < 0.5
    masked[:, 0], masked[:, 1:2] = True, False
    return p, h, other, masked & ~padding_mask, padding_mask


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.floats(0.1, 3),
    st.floats(0, 3),
    st.booleans(),
    st.integers(0, 1000),
)
def test_it_is_the_loop_over_frames(lengths: list[int], m: float, u: float, two_targets: bool, seed: int) -> None:
    p, h, other, masked, padding_mask = case(lengths, seed)
    got = masked_hidden_state_loss(
        p, h, masked, padding_mask, WEIGHTS, FrameWeights(m, u), other if two_targets else None
    )
    sums = {True: 0.0, False: 0.0}
    l1, count = 0.0, 0
    for row, length in enumerate(lengths):
        for t in range(length):
            is_masked = bool(masked[row, t])
            target = other if two_targets and not is_masked else h
            frame = hidden_state_loss(p[row : row + 1, t : t + 1], target[row : row + 1, t : t + 1], None, WEIGHTS)
            sums[is_masked] += frame.total.item() * (m if is_masked else u)
            if is_masked or u > 0:
                l1, count = l1 + frame.l1.item(), count + 1
    assert got.masked.item() == pytest.approx(sums[True], rel=1e-9, abs=1e-12)
    assert got.unmasked.item() == pytest.approx(sums[False], rel=1e-9, abs=1e-12)
    assert got.total.item() == pytest.approx(sum(sums.values()), rel=1e-9)
    assert got.l1.item() == pytest.approx(l1, rel=1e-9) and got.num_frames == count


def test_closed_form() -> None:
    """Prediction 0; clean targets 1, targets of masked audio 10; two of four frames masked."""
    p, h = torch.zeros(1, 4, 3), torch.ones(1, 4, 3)
    masked = torch.tensor([[True, False, True, False]])
    l1 = LossWeights(1.0, 0.0, 0.0)
    assert masked_hidden_state_loss(p, h, masked, None, l1, LIGHTHUBERT, 10 * h).total.item() == 2
    assert masked_hidden_state_loss(p, h, masked, None, l1, ARMHUBERT, 10 * h).total.item() == 2 + 20
    assert masked_hidden_state_loss(p, h, masked, None, l1, FrameWeights(0.5, 3.0), None).total.item() == 1 + 6
    assert [masked_hidden_state_loss(p, h, masked, None, l1, w).num_frames for w in (LIGHTHUBERT, ARMHUBERT)] == [2, 4]


def test_both_weights_1_on_clean_targets_is_the_plain_loss() -> None:
    p, h, _, masked, padding_mask = case([6, 3, 5])
    got = masked_hidden_state_loss(p, h, masked, padding_mask, WEIGHTS, ARMHUBERT)
    plain = hidden_state_loss(p, h, padding_mask, WEIGHTS)
    for name in ("total", "l1", "l2", "cos"):
        torch.testing.assert_close(getattr(got, name), getattr(plain, name))
    assert got.num_frames == plain.num_frames == 14


def test_gradient_reaches_counted_frames_only() -> None:
    p, h, other, masked, padding_mask = case([6, 3])
    for weights, reached in (
        (LIGHTHUBERT, masked),
        (FrameWeights(0.0, 1.0), ~masked & ~padding_mask),
        (ARMHUBERT, ~padding_mask),
    ):
        x = p.clone().requires_grad_()
        masked_hidden_state_loss(x, h, masked, padding_mask, WEIGHTS, weights, other).total.backward()
        assert x.grad is not None and torch.equal(x.grad.abs().sum(-1) > 0, reached)


def test_gradcheck() -> None:
    p, h, other, masked, padding_mask = case([4, 2], channels=3)
    assert torch.autograd.gradcheck(
        lambda x: masked_hidden_state_loss(x, h, masked, padding_mask, WEIGHTS, FrameWeights(0.7, 0.4), other).total,
        p.requires_grad_(),
    )


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padded_batch_equals_single_utterances(garbage: float) -> None:
    lengths = [6, 2, 5]
    p, h, other, masked, padding_mask = case(lengths)
    weights = FrameWeights(0.7, 0.4)
    singles = [
        masked_hidden_state_loss(
            *(x[i : i + 1, :n] for x in (p, h, masked)), None, WEIGHTS, weights, other[i : i + 1, :n]
        )
        for i, n in enumerate(lengths)
    ]
    for tensor in (p, h, other):
        tensor[padding_mask] = garbage
    batch = masked_hidden_state_loss(p, h, masked, padding_mask, WEIGHTS, weights, other)
    assert batch.total.item() == pytest.approx(sum(s.total.item() for s in singles), rel=1e-10)
    assert batch.num_frames == 13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [6e4, 6e-8])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, size: float) -> None:
    p, h, other, masked, padding_mask = case([30, 9], channels=64)
    p, h, other = ((size * x / 5).to(dtype) for x in (p, h, other))
    got = masked_hidden_state_loss(p, h, masked, padding_mask, WEIGHTS, ARMHUBERT, other)
    exact = masked_hidden_state_loss(p.double(), h.double(), masked, padding_mask, WEIGHTS, ARMHUBERT, other.double())
    assert got.total.dtype == torch.float32 and got.total.item() == pytest.approx(exact.total.item(), rel=1e-4)


def test_nothing_masked_is_finite() -> None:
    p, h, _, masked, padding_mask = case([4])
    p.requires_grad_()
    got = masked_hidden_state_loss(p, h, masked & False, padding_mask, WEIGHTS, LIGHTHUBERT)
    got.total.backward()
    assert got.num_frames == 0 and got.total.item() == 0 and p.grad is not None and not p.grad.any()


def test_errors() -> None:
    p, h, _, masked, _ = case([4])
    with pytest.raises(ValueError, match=r"`masked` must be \[B, T\] = \(1, 4\), True = masked, but is \(1, 3\)"):
        masked_hidden_state_loss(p, h, masked[:, :3])
    with pytest.raises(ValueError, match=r"`prediction` and `target` must both be \[B, T, C\]"):
        masked_hidden_state_loss(p, h, masked, None, None, ARMHUBERT, h[..., :2])
    for weights in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"\(masked, unmasked\) frames must be at least 0, and one positive"):
            FrameWeights(*weights)
