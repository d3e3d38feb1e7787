"""`label_loss` against a slow loop, its gradient, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.losses import label_loss


def draw(batch: int, classes: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (batch,), generator=generator)


@settings(deadline=None, max_examples=50)
@given(batch=st.integers(1, 5), classes=st.integers(2, 6), seed=st.integers(0, 999))
def test_is_a_loop(batch: int, classes: int, seed: int) -> None:
    logits, targets = draw(batch, classes, seed, torch.float64)
    total, correct = 0.0, 0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        total -= math.log(math.exp(row[target]) / sum(map(math.exp, row)))
        correct += max(range(classes), key=row.__getitem__) == target
    loss = label_loss(logits, targets)
    assert loss.total.item() == pytest.approx(total, rel=1e-5, abs=1e-6) and loss.num_correct == correct


def test_a_sum_over_utterances() -> None:
    logits, targets = draw(5, 4, 0)
    parts = [label_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(5)]
    whole = label_loss(logits, targets)
    torch.testing.assert_close(whole.total, sum(part.total for part in parts))
    assert whole.num_correct == sum(part.num_correct for part in parts)


def test_gradient_is_probability_minus_target() -> None:
    logits, targets = draw(3, 4, 1)
    label_loss(logits.requires_grad_(), targets).total.backward()
    expected = logits.detach().softmax(-1) - torch.nn.functional.one_hot(targets, 4)
    torch.testing.assert_close(logits.grad, expected)


def test_half_precision_is_summed_in_float32() -> None:
    logits, targets = draw(3, 4, 2)
    loss = label_loss((1000 * logits).half(), targets)
    assert loss.total.dtype == torch.float32 and torch.isfinite(loss.total)
    torch.testing.assert_close(loss.total, label_loss((1000 * logits).half().float(), targets).total)


def test_wrong_shapes_and_labels_are_refused() -> None:
    logits, targets = draw(3, 4, 3)
    with pytest.raises(
        ValueError, match=r"`logits` must be \[B, V\] and `targets` \[B\], but are \(3, 2, 4\) and \(3,\)"
    ):
        label_loss(logits[:, None].expand(3, 2, 4), targets)
    with pytest.raises(ValueError, match=r"`targets` must be from 0 to 3, but are from \d to 4"):
        label_loss(logits, torch.tensor([1, 4, 2]))
