"""The distillation loss against a loop over frames; padding, half precision, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.losses import LossWeights, hidden_state_loss

WEIGHTS = LossWeights(l1=0.7, l2=1.3, cosine=2.0)


def pair(batch: int, frames: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, channels)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def reference(p: torch.Tensor, h: torch.Tensor, lengths: list[int], log_sigmoid: bool) -> tuple[float, float, float]:
    l1 = l2 = cosine = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            a, b = p[row, t].tolist(), h[row, t].tolist()
            l1 += sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
            l2 += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
            cos = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            cosine += math.log(1 + math.exp(-cos)) if log_sigmoid else -cos
    return l1, l2, cosine


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_loss_is_the_loop_over_valid_frames(lengths: list[int], channels: int, log_sigmoid: bool, seed: int) -> None:
    p, h = pair(len(lengths), max(lengths), channels, seed)
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    weights = LossWeights(0.7, 1.3, 2.0, "log_sig" if log_sigmoid else "raw")
    got = hidden_state_loss(p, h, padding_mask, weights)
    l1, l2, cosine = reference(p, h, lengths, log_sigmoid)
    assert [got.l1.item(), got.l2.item(), got.cos.item()] == pytest.approx([l1, l2, cosine], rel=1e-4, abs=1e-5)
    assert got.total.item() == pytest.approx(0.7 * l1 + 1.3 * l2 + 2.0 * cosine, rel=1e-4, abs=1e-4)
    assert got.num_frames == sum(lengths)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padded_batch_equals_single_utterances(garbage: float) -> None:
    p, h = pair(3, 8, 5)
    lengths = [8, 3, 6]
    padding_mask = torch.arange(8) >= torch.tensor(lengths)[:, None]
    single_p = [p[i : i + 1, :n].clone().requires_grad_() for i, n in enumerate(lengths)]
    singles = [hidden_state_loss(x, h[i : i + 1, : lengths[i]], None, WEIGHTS) for i, x in enumerate(single_p)]
    sum(s.total for s in singles).backward()
    p[padding_mask], h[padding_mask] = garbage, garbage
    p.requires_grad_()
    batch = hidden_state_loss(p, h, padding_mask, WEIGHTS)
    batch.total.backward()
    assert batch.total.item() == pytest.approx(sum(s.total.item() for s in singles), rel=1e-5)
    assert batch.num_frames == sum(s.num_frames for s in singles)
    assert p.grad is not None and (p.grad[padding_mask] == 0).all()
    for i, (x, n) in enumerate(zip(single_p, lengths, strict=True)):
        torch.testing.assert_close(p.grad[i : i + 1, :n], x.grad)


@pytest.mark.parametrize("cosine_type", ["raw", "log_sig"])
def test_gradient(cosine_type: str) -> None:
    # the loss computes in float32, so numeric differentiation is checked with a coarse step
    p, h = pair(2, 3, 4, seed=1)
    p.requires_grad_()
    weights = LossWeights(0.7, 1.3, 2.0, cosine_type)
    hidden_state_loss(p, h, None, weights).total.backward()
    for index in [(0, 0, 0), (0, 2, 3), (1, 1, 2)]:
        step = torch.zeros_like(p)
        step[index] = 1e-2
        with torch.no_grad():
            up, down = (hidden_state_loss(p + sign * step, h, None, weights).total.item() for sign in (1, -1))
        assert p.grad is not None and p.grad[index].item() == pytest.approx((up - down) / 2e-2, rel=1e-2, abs=2e-3)


@pytest.mark.parametrize("cosine_type", ["raw", "log_sig"])
def test_gradcheck(cosine_type: str) -> None:
    """float64 stays float64."""
    p, h = (x.double() for x in pair(2, 3, 4, seed=1))
    mask = torch.tensor([[False, False, False], [False, False, True]])
    weights = LossWeights(0.7, 1.3, 2.0, cosine_type)
    assert torch.autograd.gradcheck(lambda x: hidden_state_loss(x, h, mask, weights).total, p.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [6e4, 6e-8])
def test_largest_and_smallest_values_of_half_precision_are_finite(dtype: torch.dtype, size: float) -> None:
    p, h = ((size * x / x.abs().max()).to(dtype) for x in pair(2, 50, 64))
    for cosine_type in ("raw", "log_sig"):
        got = hidden_state_loss(p, h, None, LossWeights(0.7, 1.3, 2.0, cosine_type))
        assert all(term.isfinite() for term in got[:4])
        expected = hidden_state_loss(p.double(), h.double(), None, LossWeights(0.7, 1.3, 2.0, cosine_type))
        assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-4)


def test_perfect_prediction() -> None:
    p, _ = pair(2, 3, 4)
    got = hidden_state_loss(p, p.clone(), None, LossWeights())
    assert got.l1.item() == 0 and got.l2.item() == 0 and got.total.item() == pytest.approx(-6, rel=1e-6)
    log_sigmoid = hidden_state_loss(p, p.clone(), None, LossWeights(cosine_type="log_sig"))
    assert log_sigmoid.total.item() == pytest.approx(6 * math.log(1 + math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p, h = pair(2, 50, 64)
    p, h = (300 * p).to(dtype), (300 * h).to(dtype)  # squares overflow in float16
    got = hidden_state_loss(p.requires_grad_(), h, None, WEIGHTS)
    expected = hidden_state_loss(p.detach().float(), h.float(), None, WEIGHTS)
    assert got.total.dtype == torch.float32 and torch.equal(got.total, expected.total)
    got.total.backward()
    assert p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_targets_of_inference_mode(masked: bool) -> None:
    """Autograd refuses to save such tensors for the backward pass, so none may get there."""
    p, h = pair(1, 4, 3)
    with torch.inference_mode():
        target = h * 1.0
    mask = torch.tensor([[False, False, False, True]]) if masked else None
    hidden_state_loss(p.requires_grad_(), target, mask).total.backward()
    assert p.grad is not None and p.grad.abs().sum() > 0


def test_no_gradient_flows_into_the_target() -> None:
    p, h = pair(1, 4, 3)
    hidden_state_loss(p.requires_grad_(), h.requires_grad_()).total.backward()
    assert h.grad is None and p.grad is not None


def test_zero_frames_and_zero_vectors_are_finite() -> None:
    p, h = pair(1, 4, 3)
    p.requires_grad_()
    empty = hidden_state_loss(p, h, torch.ones(1, 4, dtype=torch.bool))
    empty.total.backward()
    assert empty.num_frames == 0 and empty.total.item() == 0 and p.grad is not None and not p.grad.any()
    zeros = torch.zeros(1, 4, 3, requires_grad=True)
    hidden_state_loss(zeros, h).total.backward()
    assert zeros.grad is not None and zeros.grad.isfinite().all()


def test_terms_without_weight_take_no_part() -> None:
    p, h = pair(1, 4, 3)
    p[0, 0, 0] = 1e30  # its square is infinite, and 0 * inf is NaN
    got = hidden_state_loss(p, h, None, LossWeights(l1=1.0, l2=0.0, cosine=0.0))
    assert torch.equal(got.total, got.l1) and got.total.isfinite()
    assert not got.l1.requires_grad


def test_errors() -> None:
    p, h = pair(2, 5, 3)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\) and \(2, 4, 3\); frames that differ by one"):
        hidden_state_loss(p, h[:, :4])
    with pytest.raises(ValueError, match="widths are matched by the heads"):
        hidden_state_loss(p, h[..., :2])
    with pytest.raises(ValueError, match=r"bool \[B, T\] = \(2, 5\).*torch.bool \(2, 1600\); a mask over samples"):
        hidden_state_loss(p, h, torch.zeros(2, 1600, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"but is torch.int64"):
        hidden_state_loss(p, h, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="one of raw, log_sig, but is 'cos'"):
        LossWeights(cosine_type="cos")
    for weights in ((0.0, 0.0, 0.0), (-1.0, 0.0, 1.0), (float("nan"), 0.0, 1.0)):
        with pytest.raises(ValueError, match="must be at least 0, and one positive"):
            LossWeights(*weights)
