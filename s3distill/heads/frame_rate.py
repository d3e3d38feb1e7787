"""Predictions of a student with time reduction, brought to the teacher's frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def match_frames(prediction: Tensor, num_frames: int) -> Tensor:
    """Cuts [B, T, C] to ``num_frames``, or appends frames of zeros, which `without_prediction` marks."""
    return F.pad(prediction, (0, 0, 0, num_frames - prediction.shape[1]))


def without_prediction(
    padding_mask: Tensor | None, factor: int, batch_size: int, num_frames: int, device: torch.device
) -> Tensor | None:
    """The teacher's frames for which a student has no prediction: padding, and the last T mod ``factor`` of T.

    The student makes floor(T / factor) frames of T, and its heads ``factor`` of each. An utterance loses the same frames
    whatever it is padded to.

    Args:
        padding_mask: of the student's frames, [B, T // factor], True = padding, or None.
        num_frames: T, of the teacher.
    Returns:
        [B, T] bool, or None when every frame has one.
    """
    if padding_mask is None:
        num_predicted = torch.full((batch_size,), num_frames // factor * factor, device=device)
        if num_frames % factor == 0:
            return None
    else:
        num_predicted = (~padding_mask).sum(-1) * factor
    return torch.arange(num_frames, device=device) >= num_predicted[:, None]
