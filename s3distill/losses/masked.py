"""Masked distillation: the student hears audio with masked spans, and masked and unmasked frames count separately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s3distill.losses.hidden_state import HiddenStateLoss, LossWeights, hidden_state_loss
from s3distill.losses.precision import at_least_float32


@dataclass(frozen=True)
class FrameWeights:
    """Weights of masked and unmasked frames; the defaults are LightHuBERT's, masked frames only.

    Raises:
        ValueError: a negative weight, or no positive one.
    """

    masked: float = 1.0
    unmasked: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.masked, self.unmasked)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                f"the weights of (masked, unmasked) frames must be at least 0, and one positive, but are {weights}"
            )


class MaskedLoss(NamedTuple):
    """Sums over the frames that count, [] float32 each (float64 of such states); divide by ``num_frames`` for means.

    Attributes:
        total: the loss, differentiable.
        masked, unmasked: the two parts that ``total`` is the sum of, weighted and detached.
        l1, l2, cos: the terms of `HiddenStateLoss`, over masked and unmasked frames of positive weight, unweighted and
            detached.
        num_frames: valid frames of positive weight.
    """

    total: Tensor
    masked: Tensor
    unmasked: Tensor
    l1: Tensor
    l2: Tensor
    cos: Tensor
    num_frames: int


def masked_hidden_state_loss(
    prediction: Tensor,
    target: Tensor,
    masked: Tensor,
    padding_mask: Tensor | None = None,
    weights: LossWeights | None = None,
    frame_weights: FrameWeights | None = None,
    unmasked_target: Tensor | None = None,
) -> MaskedLoss:
    """Loss of one layer of a student that hears masked audio x', M = its masked frames, U = the others.

        L = m sum_(t in M) d(p_t(x'), h_t(x))  +  u sum_(t in U) d(p_t(x'), h_t(y)),   d = `hidden_state_loss` of a frame

        m = 1, u = 0         LightHuBERT (Wang et al., 2022): the teacher hears the clean audio x, masked frames count
        m = u = 1, y = x'    masking distillation of ARMHuBERT (Jang et al., 2023, Recycle-and-Distill): at unmasked frames
                             the target is what the teacher makes of the same masked audio, since a student that hears x'
                             cannot know what the clean context would have made of them

    Chosen here: the distance d is this project's, with its weights, and so are the layers; ARMHuBERT takes the squared error
    of every layer (``LossWeights(0, 1, 0)``), LightHuBERT's own distance and supernet are not rebuilt. Divided by
    ``num_frames``, L is the mean over the frames that count: masked ones, or all valid ones where m and u are positive, which
    is ARMHuBERT's division. Both models put their own mask embedding at the same frames.

    Args:
        prediction: p(x'), [B, T, C].
        target: h(x), [B, T, C].
        masked: [B, T] bool, True = masked in the student's input.
        padding_mask: [B, T] bool, True = padding, or None.
        unmasked_target: h(y), [B, T, C]; None = ``target``, the teacher hears the clean audio everywhere.
    Raises:
        ValueError: the shapes differ.
    """
    frame_weights = frame_weights or FrameWeights()
    if masked.shape != prediction.shape[:2]:
        raise ValueError(
            f"`masked` must be [B, T] = {tuple(prediction.shape[:2])}, True = masked, but is {tuple(masked.shape)}"
        )
    padded = torch.zeros_like(masked) if padding_mask is None else padding_mask
    zero = at_least_float32(prediction.new_zeros(()))
    at_masked = at_unmasked = HiddenStateLoss(zero, zero, zero, zero, 0)
    if frame_weights.masked > 0:
        at_masked = hidden_state_loss(prediction, target, padded | ~masked, weights)
    if frame_weights.unmasked > 0:
        target = target if unmasked_target is None else unmasked_target
        at_unmasked = hidden_state_loss(prediction, target, padded | masked, weights)
    parts = frame_weights.masked * at_masked.total, frame_weights.unmasked * at_unmasked.total
    return MaskedLoss(
        total=parts[0] + parts[1],
        masked=parts[0].detach(),
        unmasked=parts[1].detach(),
        l1=at_masked.l1 + at_unmasked.l1,
        l2=at_masked.l2 + at_unmasked.l2,
        cos=at_masked.cos + at_unmasked.cos,
        num_frames=at_masked.num_frames + at_unmasked.num_frames,
    )
