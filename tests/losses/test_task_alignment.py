"""Task alignment: KL by hand, gradient, padding, mean over old tasks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s3distill.losses import task_alignment_loss

PADDING = torch.arange(5) >= torch.tensor([5, 3])[:, None]


def logits(seed: int, num_symbols: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, 5, num_symbols, generator=generator, dtype=torch.float64)


def test_by_hand() -> None:
    student = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    old = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log() + 7  # an offset does not count
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    got = task_alignment_loss([student], [old])
    assert got.total.item() == pytest.approx(expected, rel=1e-5) and got.num_frames == 2
    # the student comes first: the other direction is another number
    assert task_alignment_loss([old], [student]).total.item() != pytest.approx(expected, rel=1e-2)
    assert task_alignment_loss([student], [student - 3]).total.item() == pytest.approx(0, abs=1e-6)


def test_mean_over_old_tasks() -> None:
    pairs = [(logits(0), logits(1)), (logits(2, 7), logits(3, 7))]
    got = task_alignment_loss([p for p, _ in pairs], [q for _, q in pairs], PADDING)
    single = [task_alignment_loss([p], [q], PADDING).total for p, q in pairs]
    assert got.total.item() == pytest.approx(sum(single).item() / 2, rel=1e-12) and got.num_frames == 8


@pytest.mark.parametrize("rubbish", [math.nan, -math.inf])
def test_padding_is_not_read(rubbish: float) -> None:
    student, old = logits(0).requires_grad_(), logits(1)
    spoiled = old.masked_fill(PADDING[:, :, None], rubbish)
    got = task_alignment_loss([student.masked_fill(PADDING[:, :, None], rubbish)], [spoiled], PADDING)
    alone = [task_alignment_loss([student[:1]], [old[:1]]), task_alignment_loss([student[1:, :3]], [old[1:, :3]])]
    assert got.total.item() == pytest.approx(sum(loss.total.item() for loss in alone), rel=1e-12)
    (gradient,) = torch.autograd.grad(got.total, student)
    assert not gradient[PADDING].any() and gradient[~PADDING].abs().min() > 0


def test_gradient_reaches_the_student_alone() -> None:
    student, old = logits(0).requires_grad_(), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: task_alignment_loss([p], [old.detach()], PADDING).total, student)
    assert torch.autograd.grad(task_alignment_loss([student], [old]).total, old, allow_unused=True) == (None,)
    with torch.inference_mode():
        frozen = logits(1)
    task_alignment_loss([student], [frozen]).total.backward()
    assert student.grad.abs().max() > 0.01


def test_faults() -> None:
    with pytest.raises(ValueError, match="needs a head and a frozen model for each old task, but has 2 and 1"):
        task_alignment_loss([logits(0), logits(1)], [logits(2)])
    with pytest.raises(ValueError, match="for each old task, but has 0 and 0"):
        task_alignment_loss([], [])
    with pytest.raises(ValueError, match=r"old task 2 .* \(2, 5, 4\) \(student\) and \(2, 5, 7\)"):
        task_alignment_loss([logits(0), logits(1)], [logits(2), logits(3, 7)])
    with pytest.raises(ValueError, match=r"`padding_mask` must be \[B, T\] = \(2, 5\).* but is \(2, 4\)"):
        task_alignment_loss([logits(0)], [logits(1)], PADDING[:, :4])
