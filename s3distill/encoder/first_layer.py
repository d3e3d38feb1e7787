"""The first convolution and the GroupNorm behind it, as one product, on a CPU.

With one channel per group and one input channel, channel c of the convolution is w_c . u_t over the windows u_t of the
waveform, so that its moments are those of the windows: mean w_c . m and variance w_c^T S w_c, with m and S the windows' mean
[K] and covariance [K, K]. Hence

    GroupNorm(w_c . u_t) = gamma_c (w_c . (u_t - m)) / sqrt(w_c^T S w_c + eps) + beta_c,

a product of the centred windows with scaled weights: the largest activation of the encoder is written once instead of twice,
and nothing of its size is kept for the backward pass. S of a smooth waveform is close to singular: the moments, which are
K + K^2 numbers, are taken in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from s3distill import kernels, products


def conv_group_norm(x: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm, num_valid: Tensor | None) -> Tensor:
    """GroupNorm(Conv1d(x)), one channel per group.

    Args:
        x: waveforms, [B, 1, S].
        conv: without padding, from 1 to C channels; its bias shifts a channel and its mean alike, and is of no account.
        norm: C groups of C channels.
        num_valid: frames per row that the statistics count, [B], each >= 1; None = all.
    Returns:
        [B, C, T]; frames that are not valid hold finite values that nothing reads. Gradients go to the parameters only.
    """
    kernel, stride, dtype = conv.weight.shape[2], conv.stride[0], products.compute_dtype(x)
    with kernels.without_autocast(x.device):
        windows = x[:, 0].unfold(-1, kernel, stride).double()  # [B, S] -> [B, T, K]
        numbers = [windows.shape[1]] * len(windows) if num_valid is None else num_valid.tolist()
        means = torch.stack([row[:n].mean(0) for row, n in zip(windows, numbers, strict=True)])
        windows = windows - means[:, None]
        covariances = torch.stack([_covariance(row[:n]) for row, n in zip(windows, numbers, strict=True)])  # [B, K, K]
        weight = conv.weight[:, 0].double()  # [C, K]
        # elementwise: as products they would count among the operations of the network
        variance = ((weight[:, :, None] * weight[:, None, :]) * covariances[:, None]).sum((2, 3))  # [B, C]
        scale = norm.weight.double() * torch.rsqrt(variance.clamp_min(0) + norm.eps)
        weights = weight * scale[:, :, None]  # [B, C, K]
        shift = norm.bias if conv.bias is None else norm.bias + 0 * conv.bias  # its gradient is 0, and not missing
    result: Tensor = _ProductPerRow.apply(windows.to(dtype), weights.to(dtype), shift.to(dtype))
    return result.transpose(1, 2)


def _covariance(windows: Tensor) -> Tensor:
    """Of centred windows [T, K] -> [K, K]."""
    taps = windows.t().contiguous()
    return torch.stack([(taps * tap).mean(1) for tap in taps])


class _ProductPerRow(torch.autograd.Function):
    """[B, T, K] x [B, C, K] + [C] -> [B, T, C]: a product per row of the batch; gradients go to weights and bias."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(windows)
        result = windows.new_empty(*windows.shape[:2], weights.shape[1])
        for target, row, weight in zip(result, windows, weights, strict=True):
            target.copy_(products.product(row, weight, bias))
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        (windows,) = ctx.saved_tensors
        # with the few rows first: 1/2 to 1/6 of the time
        rows = [products.product(row.t(), g.t()).t() for g, row in zip(grad, windows, strict=True)]
        return None, torch.stack(rows), grad.flatten(0, 1).sum(0)
