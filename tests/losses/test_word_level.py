"""Losses of models with a decoder against loops over symbols; padding, temperature, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.losses.word_level import nbest_cross_entropy, text_cross_entropy, word_level_divergence

PAD = 1


def texts(lengths: list[int], symbols: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher [N, U, V] float64, and targets [N, U] padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    student, teacher = (torch.randn((*shape, symbols), generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(2, symbols, shape, generator=generator)
    targets[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]] = PAD
    return student, teacher, targets


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(z / temperature) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(3, 6), st.integers(0, 1000)


@settings(max_examples=25, deadline=None)
@given(*shapes, st.sampled_from([0.0, 0.1, 0.5]))
def test_cross_entropy_is_the_loop_over_symbols(lengths: list[int], symbols: int, seed: int, smoothing: float) -> None:
    logits, _, targets = texts(lengths, symbols, seed)
    got = text_cross_entropy(logits, targets, PAD, smoothing)
    for n, length in enumerate(lengths):
        expected = 0.0
        for u in range(length):
            p = softmax(logits[n, u].tolist())
            for v in range(symbols):
                wanted = (1 - smoothing) * float(v == targets[n, u]) + smoothing / symbols
                expected -= wanted * math.log(p[v])
        assert got.per_text[n].item() == pytest.approx(expected, rel=1e-9)
    best = [int(logits[n, u].argmax() == targets[n, u]) for n, length in enumerate(lengths) for u in range(length)]
    assert got.num_symbols.tolist() == lengths and got.num_correct == sum(best)


@settings(max_examples=25, deadline=None)
@given(*shapes, st.sampled_from([0.5, 1.0, 2.0]))
def test_divergence_is_the_loop_over_symbols(lengths: list[int], symbols: int, seed: int, temperature: float) -> None:
    student, teacher, targets = texts(lengths, symbols, seed)
    expected = 0.0
    for n, length in enumerate(lengths):
        for u in range(length):
            p, q = (softmax(z[n, u].tolist(), temperature) for z in (teacher, student))
            expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    got = word_level_divergence(student, teacher, targets, PAD, temperature)
    assert got.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("-inf")])
def test_padding_changes_no_loss_and_no_gradient(garbage: float) -> None:
    student, teacher, targets = texts([5, 2, 3], 6)
    padded = targets == PAD

    def losses(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return text_cross_entropy(z, y, PAD, 0.1).per_text.sum() + word_level_divergence(z, t, y, PAD, 2.0)

    singles = [student[n : n + 1, :u].clone().requires_grad_() for n, u in enumerate((5, 2, 3))]
    alone = sum(
        losses(z, teacher[n : n + 1, : z.shape[1]], targets[n : n + 1, : z.shape[1]]) for n, z in enumerate(singles)
    )
    alone.backward()
    student[padded], teacher[padded] = garbage, garbage
    student.requires_grad_()
    together = losses(student, teacher, targets)
    together.backward()
    assert together.item() == pytest.approx(alone.item(), rel=1e-12)
    assert torch.allclose(student.grad[0], singles[0].grad[0]) and torch.equal(
        student.grad[padded], torch.zeros(5, 6).double()
    )


def test_a_teacher_that_agrees_costs_nothing_and_one_that_does_not_costs_something() -> None:
    student, teacher, targets = texts([4, 3], 5)
    assert word_level_divergence(student, student + 7, targets, PAD, 2.0).item() == pytest.approx(0, abs=1e-12)
    assert word_level_divergence(student, teacher, targets, PAD, 2.0).item() > 0.1


def test_temperature_keeps_the_size_of_gradients() -> None:
    """Hinton et al.: with tau^2 the gradient tends to that of the squared distance of logits, tau or not."""
    student, teacher, targets = texts([3], 5)
    gradients = []
    for temperature in (1e3, 1e4):
        student = student.detach().requires_grad_()
        word_level_divergence(student, teacher, targets, PAD, temperature).backward()
        gradients.append(student.grad)
    centred = [z - z.mean(-1, keepdim=True) for z in (student.detach(), teacher)]
    assert torch.allclose(gradients[1], (centred[0] - centred[1]) / 5, atol=1e-3)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-2)


def test_gradients_are_right() -> None:
    student, teacher, targets = texts([3, 2], 4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: text_cross_entropy(z, targets, PAD, 0.1).per_text, (student,))
    assert torch.autograd.gradcheck(lambda z: word_level_divergence(z, teacher, targets, PAD, 2.0), (student,))


def test_half_precision_is_summed_in_float32() -> None:
    student, teacher, targets = texts([5, 4], 6)
    exact = word_level_divergence(student.half().double(), teacher.half().double(), targets, PAD, 2.0)
    half = word_level_divergence(student.half(), teacher.half(), targets, PAD, 2.0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-5)


def test_hypotheses_count_by_weight_and_length() -> None:
    per_text = torch.tensor([6.0, 2.0, 9.0])
    got = nbest_cross_entropy(
        per_text, torch.tensor([3, 2, 3]), torch.tensor([0.75, 0.25, 1.0]), torch.tensor([0, 0, 2]), 3
    )
    assert got.tolist() == pytest.approx([0.75 * 2 + 0.25 * 1, 0, 3])


def test_errors_name_what_is_wrong() -> None:
    student, teacher, targets = texts([3, 2], 4)
    with pytest.raises(ValueError, match=r"must have one shape \[N, U, V\], but have \(2, 3, 4\) and \(2, 3, 3\)"):
        word_level_divergence(student, teacher[..., :3], targets, PAD)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, but is 0"):
        word_level_divergence(student, teacher, targets, PAD, 0)
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 1\), but is 1"):
        text_cross_entropy(student, targets, PAD, 1)
    with pytest.raises(ValueError, match=r"`targets` \[N, U\], but are \(2, 3, 4\) and \(2, 2\)"):
        text_cross_entropy(student, targets[:, :2], PAD)
    with pytest.raises(ValueError, match="`targets` must be from 0 to 3, but are from 2 to 9"):
        text_cross_entropy(student, torch.where(targets == 3, 9, targets), PAD)
