"""The gradient of a mask: straight through the binary step to the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """W_eff = W * mask, with gradients for scores and weight  (S3-Router, section 3.1; Bengio et al., 2013).

    dL/dscores = dL/dW_eff * W * sign(scores) [* sigmoid'(|scores|)],   dL/dW = dL/dW_eff * mask

    The product ``masked`` and the factor ``slope`` are computed once per update by the caller; here they are only passed on.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, weight: Tensor, masked: Tensor, slope: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Returns ``masked`` [out, in, ...]; ``slope`` (None: frozen scores) and ``mask`` (None: frozen weight) are for `backward`."""
        ctx.save_for_backward(slope, mask)
        ctx.shape = scores.shape
        # another tensor of the same version: writing to ``masked`` before the backward pass that needs it is an error
        return masked.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        slope, mask = ctx.saved_tensors
        grad_scores, grad_weight = None, None
        if slope is not None and ctx.needs_input_grad[0]:
            grad_scores = (grads[0] * slope).sum_to_size(ctx.shape)
        if mask is not None and ctx.needs_input_grad[1]:
            grad_weight = grads[0] * mask.view(torch.uint8)  # which the CPU multiplies with faster than with bool
        return grad_scores, grad_weight, None, None, None


def score_slope(scores: Tensor, weight: Tensor, sigmoid: bool, out: Tensor | None = None) -> Tensor:
    """W * sign(scores), times sigmoid'(|scores|) if ``sigmoid`` (option ``ste_sigmoid``); [out, in, ...], float32 or the type of ``out``.

    At a score of 0, where |.| has no derivative, the sign is taken as +1: scores that start at 0 would never move otherwise.
    """
    # 1 where negative, then 1 - 2 x: on a CPU `torch.where` takes five times as long, since its branches cannot be predicted
    sign = torch.lt(scores, 0, out=torch.empty_like(scores)).mul_(-2).add_(1)
    if sigmoid:
        value = torch.sigmoid(scores.abs())
        sign = sign * value * (1 - value)
    return torch.mul(weight, sign, out=out)
