"""Small pieces that the conv extractor and the Transformer share: activations, gate-weighted LayerNorm, gradient scaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill import kernels


def _gelu_accurate(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": _gelu_accurate,  # fairseq's name of the tanh approximation
    "relu": F.relu,
    "tanh": torch.tanh,
    "swish": F.silu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of fairseq's name ``name``; `EncoderConfig` has already checked that it exists."""
    return _ACTIVATIONS[name]


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension that can stand behind gates.

    With a gate ``z`` [C] on its input channels the statistics count open channels only,

        mean = sum_c w_c x_c / sum_c w_c,   var = sum_c w_c (x_c - mean)^2 / sum_c w_c,

    with ``w = z`` while training (differentiable) and ``w = [z > 0]`` in evaluation, so that cutting the closed channels
    leaves the function as it is. The gate itself is applied by the caller, behind the norm.
    """

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalises ``x`` [..., C]; ``gate`` [C] weights the statistics. Returns [..., C] in the type of ``x``."""
        if gate is None:
            return kernels.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        weight = (gate if self.training else (gate > 0)).to(torch.float32)
        values = x.float()
        share = weight / weight.sum().clamp_min(1e-6)
        with kernels.without_autocast(x.device):
            mean = values @ share
            centred = values - mean.unsqueeze(-1)
            variance = centred.square() @ share
        normed = centred * torch.rsqrt(variance + self.eps).unsqueeze(-1)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """The identity, whose gradient is multiplied by ``scale`` (``feature_grad_mult`` in fairseq)."""
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)  # type: ignore[no-any-return]
