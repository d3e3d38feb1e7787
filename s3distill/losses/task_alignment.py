"""Learning without forgetting: on the new task's audio, old heads go on giving what the old models gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from s3distill.losses.precision import at_least_float32


class TaskAlignmentLoss(NamedTuple):
    """A sum over valid frames; divide by ``num_frames`` for the mean.

    Attributes:
        total: mean over the old tasks of their KL, in nats, [] float32 (float64 of such logits), differentiable.
        num_frames: valid frames.
    """

    total: Tensor
    num_frames: int


def task_alignment_loss(
    student_logits: Sequence[Tensor], old_logits: Sequence[Tensor], padding_mask: Tensor | None = None
) -> TaskAlignmentLoss:
    """1/K sum_k sum_t KL(p_k,t || q_k,t)  over valid frames t (task alignment; Li & Hoiem, 2016, learning without forgetting).

    p_k is what the learning encoder gives through the head of old task k, q_k what the frozen copy of task k's model gives, on
    the new task's audio. Deviations: the paper's distillation term is KL(q || p) at temperature 2; the student-first direction
    at temperature 1 is that of the Whisper work whose gamma is the default here. It punishes what the old model would not say,
    rather than what it said and the student does not.

    Args:
        student_logits: per old task [B, T, V_k], any floating type.
        old_logits: per old task [B, T, V_k]; no gradient flows into them, and they may come from `torch.inference_mode`.
        padding_mask: [B, T] bool, True = padding, or None; padded frames are not read.
    Raises:
        ValueError: no old task, or shapes that differ.
    """
    _check(student_logits, old_logits, padding_mask)
    valid = ... if padding_mask is None else ~padding_mask
    total = at_least_float32(student_logits[0].new_zeros(()))
    for student, old in zip(student_logits, old_logits, strict=True):
        log_p = at_least_float32(student[valid]).log_softmax(-1)  # [B, T, V] or, of valid frames, [N, V]
        log_q = at_least_float32(old.detach()[valid]).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    num_frames = student_logits[0].shape[:2].numel() if padding_mask is None else int((~padding_mask).sum())
    return TaskAlignmentLoss(total / len(student_logits), num_frames)


def _check(student_logits: Sequence[Tensor], old_logits: Sequence[Tensor], padding_mask: Tensor | None) -> None:
    if not student_logits or len(student_logits) != len(old_logits):
        raise ValueError(
            f"task alignment needs a head and a frozen model for each old task, but has {len(student_logits)} and {len(old_logits)}"
        )
    for k, (student, old) in enumerate(zip(student_logits, old_logits, strict=True), start=1):
        if student.dim() != 3 or student.shape != old.shape:
            raise ValueError(
                f"logits of old task {k} must both be [B, T, V], but are {tuple(student.shape)} (student) and {tuple(old.shape)} "
                "(frozen model); they must have the same frame rate and symbols"
            )
        if padding_mask is not None and padding_mask.shape != student.shape[:2]:
            raise ValueError(
                f"`padding_mask` must be [B, T] = {tuple(student.shape[:2])}, one value per frame, but is {tuple(padding_mask.shape)}; a "
                "mask over samples must be reduced to frames first"
            )
