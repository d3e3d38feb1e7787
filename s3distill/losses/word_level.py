"""Losses of models with a decoder: cross-entropy of texts, and word-level distillation from a teacher's next-symbol probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.losses.precision import at_least_float32


class TextLoss(NamedTuple):
    """Cross-entropy of texts.

    Attributes:
        per_text: sum over the symbols of each text in nats, [N] float32 (float64 of such logits), differentiable.
        num_symbols: symbols of each text, its eos included, [N] int64.
        num_correct: symbols of all texts whose logit is the largest.
    """

    per_text: Tensor
    num_symbols: Tensor
    num_correct: int


def text_cross_entropy(logits: Tensor, targets: Tensor, pad: int, label_smoothing: float = 0.0) -> TextLoss:
    """CE_n = sum_(u: y_nu is no padding)  -sum_v q_v log softmax(z_nu)[v],   q = (1 - eps) [v = y_nu] + eps / V.

    q is smoothed over all V symbols, the right one included, as in Szegedy et al. (2016) and torch; fairseq's
    `label_smoothed_cross_entropy` spreads eps over the V - 1 others and a share for the right one that makes the two equal.

    Args:
        logits: z, [N, U, V], any floating type; at padding they may be anything, NaN too.
        targets: y, [N, U] int64, ``pad`` behind the end of each text.
        pad: index of the padding symbol.
        label_smoothing: eps in [0, 1).
    Raises:
        ValueError: the shapes differ, a target is no symbol, or ``label_smoothing`` is out of range.
    """
    check_label_smoothing(label_smoothing)
    valid = _valid(logits, targets, pad)
    of_text = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[valid]
    at_valid, wanted = at_least_float32(logits[valid]), targets[valid]  # [M, V], [M]
    loss = F.cross_entropy(at_valid, wanted, reduction="none", label_smoothing=label_smoothing)
    per_text = loss.new_zeros(len(targets)).index_add(0, of_text, loss)
    num_correct = int(torch.count_nonzero(at_valid.detach().argmax(-1) == wanted)) if len(wanted) else 0
    return TextLoss(per_text, valid.sum(1), num_correct)


def word_level_divergence(
    student: Tensor, teacher: Tensor, targets: Tensor, pad: int, temperature: float = 1.0
) -> Tensor:
    """tau^2 sum_(u: y_nu is no padding) KL(p_T || p_S),   p = softmax(z / tau)  (Kim and Rush, 2016, eq. 1; Hinton et al., 2015).

    Both models read the same text so far. A sum over symbols: divided by their number it is the mean, whatever the padding
    and the size of the batch. Kim and Rush leave out the teacher's entropy, a constant, and take tau = 1.

    Args:
        student: logits, [N, U, V], any floating type; at padding they may be anything, NaN too.
        teacher: the same of the teacher, without gradient.
        targets: what tells padding, [N, U] int64.
        pad: index of the padding symbol.
        temperature: tau > 0.
    Returns:
        [] float32 (float64 of such logits), in nats, differentiable in ``student``.
    Raises:
        ValueError: the shapes differ, or ``temperature`` is out of range.
    """
    check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of student and teacher must have one shape [N, U, V], but have {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "both must have the same dictionary and read the same texts"
        )
    valid = _valid(student, targets, pad)
    log_p_student = (at_least_float32(student[valid]) / temperature).log_softmax(-1)
    log_p_teacher = (at_least_float32(teacher[valid]) / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_p_student, log_p_teacher, reduction="sum", log_target=True)


def nbest_cross_entropy(
    per_text: Tensor, num_symbols: Tensor, weights: Tensor, utterances: Tensor, size: int
) -> Tensor:
    """Sequence-level distillation on K-best lists: sum_(k of utterance b) w_k CE_k / T_k  (Kim and Rush, 2016, section 3.2).

    Args:
        per_text: CE_k of all hypotheses of the batch, [N].
        num_symbols: T_k, [N].
        weights: w_k, [N], see `losses.sequence.hypothesis_weights`.
        utterances: utterance of each hypothesis, [N] int64 in [0, size).
        size: utterances of the batch, B.
    Returns:
        Nats per symbol of each utterance, [B].
    """
    per_symbol = weights.to(per_text.dtype) * per_text / num_symbols.clamp(min=1)
    return per_text.new_zeros(size).index_add(0, utterances, per_symbol)


def check_temperature(temperature: float) -> None:
    """Raises `ValueError` unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite, but is {temperature}; 1 leaves probabilities as they are"
        )


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises `ValueError` unless it is in [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"`label_smoothing` must be in [0, 1), but is {label_smoothing}; 0 leaves labels as they are")


def _valid(logits: Tensor, targets: Tensor, pad: int) -> Tensor:
    """[N, U], True = a symbol and no padding."""
    if logits.dim() != 3 or targets.shape != logits.shape[:2]:
        raise ValueError(
            f"`logits` must be [N, U, V] and `targets` [N, U], but are {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    valid = targets != pad
    found = targets[valid]
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < logits.shape[2]:
        raise ValueError(
            f"`targets` must be from 0 to {logits.shape[2] - 1}, but are from {int(found.min())} to {int(found.max())}; labels and "
            "model must have one dictionary"
        )
    return valid
