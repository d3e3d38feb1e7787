"""Normalisation of the teacher's hidden states before a student's heads predict them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from s3distill.losses.precision import at_least_float32

TARGET_NORMS = ("none", "instance", "layer")


def normalize_target(
    target: Tensor, padding_mask: Tensor | None = None, kind: str = "none", eps: float = 1e-5
) -> Tensor:
    """One layer's hidden states with zero mean and unit variance  (Baevski et al., 2022, data2vec, section 3.3).

        y_tc = (h_tc - m) / sqrt(v + eps), biased variance v, no learnt scale or shift
        ``instance``: m, v over the valid frames t of an utterance, per channel c   (data2vec's for speech)
        ``layer``:    m, v over the channels c, per frame t                         (data2vec's for vision and text)

    Layers of data2vec differ by orders of magnitude in their norms, and a few channels and the residual stream's offset
    hold most of it: unnormalised, they are most of the loss. Predictions are NOT normalised, as in data2vec: the heads
    learn to give normalised values. Computed in float32 at least; values up to float16's largest are safe.

    Args:
        target: h, [B, T, C], any floating type.
        padding_mask: [B, T] bool, True = padding, or None; padded frames take no part, and hold 0 where ``instance``.
        kind: one of `TARGET_NORMS`; ``none`` gives ``target`` back.
    Returns:
        y, [B, T, C]; float32 at least unless ``none``.
    Raises:
        ValueError: an unknown ``kind``.
    """
    if kind not in TARGET_NORMS:
        raise ValueError(f"`target_norm` must be one of {', '.join(TARGET_NORMS)}, but is {kind!r}")
    if kind == "none":
        return target
    target = at_least_float32(target)
    if kind == "layer":
        return F.layer_norm(target, target.shape[-1:], eps=eps)
    if padding_mask is None:
        centred = target - target.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    padded = padding_mask[:, :, None]
    num_frames = (~padded).sum(1, keepdim=True).clamp_min(1)  # [B, 1, 1]
    # filled, not multiplied by 0: 0 * NaN is NaN
    mean = target.masked_fill(padded, 0).sum(1, keepdim=True) / num_frames
    centred = (target - mean).masked_fill(padded, 0)
    return centred * (centred.square().sum(1, keepdim=True) / num_frames + eps).rsqrt()
