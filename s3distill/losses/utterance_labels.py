"""Cross-entropy of one class per utterance, the loss of classification."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelLoss(NamedTuple):
    """Sums over utterances; divide by their number for means.

    Attributes:
        total: cross-entropy in nats, [] float32, differentiable.
        num_correct: utterances whose largest logit is the target's.
    """

    total: Tensor
    num_correct: int


def label_loss(logits: Tensor, targets: Tensor) -> LabelLoss:
    """sum_b  -log softmax(z_b)[y_b],  computed in float32.

    A sum, not a mean: fairseq divides gradients by the sample size (the utterances) summed over ranks.

    Args:
        logits: z, [B, V], any floating type.
        targets: y, [B] int64, from 0 to V - 1.
    Raises:
        ValueError: the shapes differ, or a target is no class of these logits.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` must be [B, V] and `targets` [B], but are {tuple(logits.shape)} and {tuple(targets.shape)}; a model for frames must "
            "pool them first"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(
            f"`targets` must be from 0 to {logits.shape[1] - 1}, but are from {int(targets.min())} to {int(targets.max())}; the "
            "labels must be those that the model was trained with"
        )
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return LabelLoss(total, int(torch.count_nonzero(logits.detach().argmax(-1) == targets)))
