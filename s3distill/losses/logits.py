"""Distillation of a CTC model's outputs: the student's distribution over symbols follows the teacher's, frame by frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from s3distill.losses.precision import at_least_float32

BLANK_FRAMES = ("all", "unsure")


@dataclass(frozen=True)
class LogitTerms:
    """How logits are matched.

    Args:
        temperature: tau, above 0; both distributions are softened by it.
        blank_frames: ``all``: every frame counts. ``unsure``: those where the teacher is not sure of the blank, that is where
            its probability at temperature 1 is below ``blank_threshold``.
        blank_threshold: in (0, 1].
    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    blank_frames: str = "all"
    blank_threshold: float = 0.95

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"`temperature` divides logits and must be above 0 and finite, but is {self.temperature}; 1 leaves them as they are"
            )
        if self.blank_frames not in BLANK_FRAMES:
            raise ValueError(f"`blank_frames` must be one of {', '.join(BLANK_FRAMES)}, but is {self.blank_frames!r}")
        if not 0 < self.blank_threshold <= 1:
            raise ValueError(
                f"`blank_threshold` is a probability and must be in (0, 1], but is {self.blank_threshold}; 0.95 leaves out the frames "
                "where the teacher gives the blank 95% or more"
            )


class LogitLoss(NamedTuple):
    """Sums over valid frames; divide by ``num_frames`` for means, to which frames that do not count add 0.

    Attributes:
        total: tau^2 KL, [] float32 (float64 of such logits), differentiable in the student's logits.
        num_frames: valid frames.
        num_counted: frames with a positive weight, [] int64.
    """

    total: Tensor
    num_frames: int
    num_counted: Tensor


def logit_distillation(
    student: Tensor,
    teacher: Tensor,
    padding_mask: Tensor | None = None,
    terms: LogitTerms | None = None,
    blank: int = 0,
    frame_weights: Tensor | None = None,
) -> LogitLoss:
    """L = tau^2 sum_t w_t KL(p_t || q_t),  p = softmax(teacher / tau), q = softmax(student / tau)  (Hinton et al., 2015, section 2).

    tau^2 makes up for gradients that shrink with 1 / tau^2: for large tau, L becomes the squared error of centred logits,
    sum_t |s_t - t_t|^2 / 2V. The sum goes over valid frames only, where the paper has one distribution per example; frames that
    are left out (``blank_frames``, ``frame_weights``) stay in the denominator of the mean, so that the mean over a batch does
    not depend on how utterances are batched.

    Args:
        student, teacher: logits over the same V symbols, [B, T, V].
        padding_mask: [B, T] bool, True = padding, or None; what stands in padded frames, infinities too, is not looked at.
        blank: index of the blank.
        frame_weights: w, [B, T], bool or float; None = 1 everywhere.
    Raises:
        ValueError: shapes differ.
    """
    terms = terms or LogitTerms()
    if student.shape != teacher.shape:
        raise ValueError(
            f"the logits of student and teacher must have the same shape [B, T, V], but have {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; do both cut audio into the same frames, and are the symbols matched?"
        )
    if padding_mask is not None:
        student, teacher = student[~padding_mask], teacher[~padding_mask]  # [N, V]
        frame_weights = None if frame_weights is None else frame_weights[~padding_mask]
    else:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        frame_weights = None if frame_weights is None else frame_weights.flatten()
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    tau = terms.temperature
    target = (teacher / tau).softmax(-1)
    divergence = F.kl_div((student / tau).log_softmax(-1), target, reduction="none").sum(-1)  # [N]
    weights = divergence.new_ones(divergence.shape) if frame_weights is None else frame_weights.to(divergence.dtype)
    if terms.blank_frames == "unsure":
        weights = weights * (teacher.softmax(-1)[:, blank] < terms.blank_threshold)
    return LogitLoss(tau**2 * (weights * divergence).sum(), len(divergence), (weights > 0).sum())
