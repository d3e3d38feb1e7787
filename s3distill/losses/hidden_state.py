"""Distance between predicted and teacher hidden states, the loss of distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.losses.precision import at_least_float32

COSINES = ("raw", "log_sig")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of `hidden_state_loss`; the defaults are DPHuBERT's, DistilHuBERT takes ``log_sig``.

    Args:
        l1, l2: of the mean absolute and the mean squared difference.
        cosine: of the cosine term.
        cosine_type: ``raw``, -cos, or ``log_sig``, -log sigmoid(cos).
    Raises:
        ValueError: an unknown ``cosine_type``, a negative weight, or no positive one.
    """

    l1: float = 1.0
    l2: float = 0.0
    cosine: float = 1.0
    cosine_type: str = "raw"

    def __post_init__(self) -> None:
        if self.cosine_type not in COSINES:
            raise ValueError(f"the cosine type must be one of {', '.join(COSINES)}, but is {self.cosine_type!r}")
        weights = (self.l1, self.l2, self.cosine)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"the weights (l1, l2, cosine) must be at least 0, and one positive, but are {weights}")


class HiddenStateLoss(NamedTuple):
    """Sums over valid frames, [] float32 each (float64 of such states); divide by ``num_frames`` for means.

    Attributes:
        total: the weighted sum of the three terms, differentiable.
        l1: sum over frames of the mean over channels of |p - t|, unweighted and detached, as are the next two.
        l2: the same of (p - t)^2.
        cos: sum over frames of -cos(p, t), or of -log sigmoid(cos(p, t)).
        num_frames: valid frames.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor
    cos: Tensor
    num_frames: int


def hidden_state_loss(
    prediction: Tensor, target: Tensor, padding_mask: Tensor | None = None, weights: LossWeights | None = None
) -> HiddenStateLoss:
    """Loss of one layer, summed over valid frames.

        sum_t  w_1 mean_c |p_tc - h_tc|  +  w_2 mean_c (p_tc - h_tc)^2  +  w_cos g(cos(p_t, h_t)),
        g(x) = -x              (``raw``; Peng et al., 2023, DPHuBERT)
        g(x) = -log sigmoid(x) (``log_sig``; Chang et al., 2022, DistilHuBERT, eq. 1)

    Everything is computed in float32 at least. Padded frames are not read at all: whatever they hold, NaN included, the loss and
    its gradient are those of the unpadded utterances. A sum, not a mean: fairseq divides gradients by the sample size
    (the valid frames) summed over ranks.

    Args:
        prediction: p, [B, T, C], any floating type.
        target: h, [B, T, C]; no gradient flows into it, and it may come from `torch.inference_mode`.
        padding_mask: [B, T] bool, True = padding, or None.
        weights: None = the defaults of `LossWeights`.
    Raises:
        ValueError: the shapes differ.
    """
    weights = weights or LossWeights()
    _check_shapes(prediction, target, padding_mask)
    target = target.detach()
    if padding_mask is None:
        prediction, target = prediction.flatten(0, 1), target.flatten(0, 1)  # [B, T, C] -> [N, C]
    else:
        # picked, not multiplied by 0: 0 * NaN is NaN
        valid = ~padding_mask
        prediction, target = prediction[valid], target[valid]  # [B, T, C] -> [N, C]
    prediction, target = at_least_float32(prediction), at_least_float32(target)

    difference = prediction - target
    l1 = difference.abs().mean(-1).sum()
    l2 = difference.square().mean(-1).sum()
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    cosine = -(F.logsigmoid(cosine) if weights.cosine_type == "log_sig" else cosine).sum()
    terms = ((weights.l1, l1), (weights.l2, l2), (weights.cosine, cosine))
    total = torch.stack([weight * term for weight, term in terms if weight > 0]).sum()
    return HiddenStateLoss(total, l1.detach(), l2.detach(), cosine.detach(), prediction.shape[0])


def _check_shapes(prediction: Tensor, target: Tensor, padding_mask: Tensor | None) -> None:
    if prediction.dim() != 3 or prediction.shape != target.shape:
        raise ValueError(
            f"`prediction` and `target` must both be [B, T, C], but are {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}; "
            "frames that differ by one (conv rounding) must be cut by the caller, widths are matched by the heads"
        )
    if padding_mask is not None and (padding_mask.shape != prediction.shape[:2] or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"`padding_mask` must be bool [B, T] = {tuple(prediction.shape[:2])}, True = padding, but is "
            f"{padding_mask.dtype} {tuple(padding_mask.shape)}; a mask over samples must be reduced to frames first"
        )
