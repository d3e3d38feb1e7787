"""Distillation of logits against closed forms, at its limits, and over padding."""

from __future__ import annotations

import math

import pytest
import torch

from s3distill.losses import LogitTerms, logit_distillation


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = draw(2, 5, 4, seed=1), draw(2, 5, 4, seed=2)


def test_two_symbols_have_a_closed_form() -> None:
    """With logits (a, 0) and (b, 0), p = sigmoid(a / tau)."""
    tau, a, b = 2.0, 1.5, -0.7
    p, q = 1 / (1 + math.exp(-a / tau)), 1 / (1 + math.exp(-b / tau))
    expected = tau**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    loss = logit_distillation(torch.tensor([[[b, 0.0]]]), torch.tensor([[[a, 0.0]]]), terms=LogitTerms(tau))
    assert loss.total.item() == pytest.approx(expected, rel=1e-5) and loss.num_frames == 1


def test_slow_loop() -> None:
    tau = 1.7
    expected = 0.0
    for s, t in zip(STUDENT.flatten(0, 1), TEACHER.flatten(0, 1), strict=True):
        p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
        expected += tau**2 * float(sum(p[v] * (p[v].log() - q[v].log()) for v in range(4)))
    found = logit_distillation(STUDENT, TEACHER, terms=LogitTerms(tau))
    assert found.total.item() == pytest.approx(expected, rel=1e-10) and found.num_frames == 10 == found.num_counted


def test_it_is_0_where_both_agree_and_positive_elsewhere() -> None:
    assert logit_distillation(TEACHER + 3, TEACHER).total.item() == pytest.approx(0, abs=1e-12)
    assert logit_distillation(STUDENT, TEACHER).total.item() > 0.1


def test_gradients() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    terms = LogitTerms(3.0, "unsure", 0.4)
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: logit_distillation(s, TEACHER, mask, terms).total, (student,))
    logit_distillation(student, TEACHER, mask, terms).total.backward()
    counted = (TEACHER.softmax(-1)[..., 0] < 0.4) & ~mask
    expected = terms.temperature * ((STUDENT / 3).softmax(-1) - (TEACHER / 3).softmax(-1)) * counted[..., None]
    assert torch.allclose(student.grad, expected, atol=1e-12)


def test_high_temperature_is_the_squared_error_of_centred_logits() -> None:
    """tau -> infinity: sum_t |s_t - t_t|^2 / 2V of logits with zero mean (Hinton et al., 2015, section 2.1)."""
    centred = [x - x.mean(-1, keepdim=True) for x in (STUDENT, TEACHER)]
    expected = (centred[0] - centred[1]).square().sum() / 8
    found = logit_distillation(STUDENT, TEACHER, terms=LogitTerms(1e4)).total
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_low_temperature_is_the_cross_entropy_with_the_best_symbol() -> None:
    """tau -> 0: KL / tau -> margin of the student's best symbol over the one that the teacher picks."""
    tau = 1e-3
    best = TEACHER.argmax(-1, keepdim=True)
    margin = (STUDENT.amax(-1) - STUDENT.gather(-1, best)[..., 0]).sum()
    found = logit_distillation(STUDENT, TEACHER, terms=LogitTerms(tau)).total / tau
    assert found.item() == pytest.approx(margin.item(), rel=0.02)


def test_padding_counts_nothing_whatever_stands_in_it() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    broken = [x.masked_fill(mask[..., None], -math.inf) for x in (STUDENT, TEACHER)]
    padded = logit_distillation(*broken, mask)
    alone = [logit_distillation(STUDENT[i : i + 1, :n], TEACHER[i : i + 1, :n]) for i, n in enumerate((5, 3))]
    assert padded.total.item() == pytest.approx(sum(x.total.item() for x in alone), rel=1e-12)
    assert padded.num_frames == 8 == padded.num_counted


def test_frames_where_the_teacher_is_sure_of_the_blank_are_left_out() -> None:
    teacher = TEACHER.clone()
    teacher[0, :3, 2] = 20  # blank is symbol 2 here
    terms = LogitTerms(blank_frames="unsure", blank_threshold=0.9)
    found = logit_distillation(STUDENT, teacher, terms=terms, blank=2)
    sure = teacher.softmax(-1)[..., 2] >= 0.9
    rest = logit_distillation(STUDENT, teacher, sure)
    assert sure.sum() == 3 and found.num_counted == 7 and found.num_frames == 10
    assert found.total.item() == pytest.approx(rest.total.item(), rel=1e-12)
    everything = logit_distillation(STUDENT, teacher, blank=2).total.item()
    assert everything > found.total.item() + 1


def test_frame_weights() -> None:
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[0, 1] = 0
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 4] = True
    found = logit_distillation(STUDENT, TEACHER, mask, frame_weights=weights)
    expected = sum(
        weights[i, j].item()
        * logit_distillation(STUDENT[i : i + 1, j : j + 1], TEACHER[i : i + 1, j : j + 1]).total.item()
        for i in range(2)
        for j in range(5)
        if not mask[i, j]
    )
    assert found.total.item() == pytest.approx(expected, rel=1e-10) and found.num_counted == 8
    kept = logit_distillation(STUDENT, TEACHER, mask, frame_weights=weights > 0)
    assert kept.num_counted == 8 and kept.total.item() > found.total.item()


def test_half_precision_is_summed_in_float32() -> None:
    found = logit_distillation(STUDENT.bfloat16(), TEACHER.bfloat16()).total
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(logit_distillation(STUDENT, TEACHER).total.item(), rel=0.05)


def test_a_symbol_that_the_teacher_never_says_costs_nothing() -> None:
    teacher = TEACHER.clone()
    teacher[..., 3] = -1e4
    found = logit_distillation(STUDENT.float(), teacher.float()).total
    assert found.isfinite() and found > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` divides logits and must be above 0"),
        ({"temperature": math.inf}, "must be above 0 and finite, but is inf"),
        ({"blank_frames": "some"}, "`blank_frames` must be one of all, unsure, but is 'some'"),
        ({"blank_threshold": 0.0}, r"`blank_threshold` is a probability and must be in \(0, 1\]"),
        ({"blank_threshold": 1.1}, "but is 1.1; 0.95 leaves out the frames"),
    ],
)
def test_terms_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitTerms(**options)


def test_other_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(2, 5, 4\); do both cut audio into the same frames"):
        logit_distillation(STUDENT[:, :4], TEACHER)
