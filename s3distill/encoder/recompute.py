"""GELU in front of a Linear or a convolution, whose output is computed again in the backward pass instead of kept.

What stands between two matmuls costs hardly any time and much memory: of a HuBERT Base student with gates, these products
are a quarter of what a training step on a CPU keeps for the backward pass. Where nothing is kept anyway, where something
else than a plain Linear or Conv1d follows (masks, adapters, hooks), and on other devices, the modules themselves are called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from s3distill import convolutions, products


def gelu_linear(x: Tensor, gate: Tensor | None, linear: nn.Linear) -> Tensor:
    """Linear(z * GELU(x)).

    Args:
        x: [B, T, F], in front of the activation.
        gate: z, [F], or None = 1.
    Returns:
        [B, T, C]
    """
    if not products.is_plain(linear, nn.Linear, products.Linear) or not _is_ours(x, linear.weight):
        inner = F.gelu(x)
        if gate is not None:
            inner = inner * gate.to(inner.dtype)
        return linear(inner)  # type: ignore[no-any-return]
    result: Tensor = _GeluLinear.apply(x, gate, linear.weight, linear.bias)
    return result


def gelu_conv(x: Tensor, gate: Tensor | None, conv: nn.Conv1d) -> Tensor:
    """Conv1d(z * GELU(x)), computed as the convolution of GELU(x) with the weights z * W: those are fewer.

    Args:
        x: [B, C_in, T_in], in front of the activation.
        gate: z, [C_in], or None = 1.
    Returns:
        [B, C, T]
    """
    weight = conv.weight if gate is None else conv.weight * gate.to(conv.weight.dtype)[:, None]
    simple = conv.padding == (0,) and conv.dilation == (1,) and conv.groups == 1
    if not simple or not products.is_plain(conv, nn.Conv1d):
        return conv._conv_forward(F.gelu(x), weight, conv.bias)
    if not _is_ours(x, weight):
        return convolutions.conv1d(gelu_over_rows(x), weight, conv.bias, conv.stride[0])
    result: Tensor = _GeluConv.apply(x, weight, conv.bias, conv.stride[0])
    return result


def gelu_over_rows(x: Tensor) -> Tensor:
    """GELU of [B, C, T] in the order in which `convolutions` hold it: torch rounds otherwise where memory is not contiguous."""
    return F.gelu(x.transpose(1, 2)).transpose(1, 2)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return products.is_eager_on_cpu(x) and products.needs_gradient(x, weight)


def _through_gelu(grad: Tensor, x: Tensor) -> Tensor:
    """GELU'(x) dy, written over ``grad``: dy of the first convolutions is among the largest tensors of a step."""
    result: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return result


class _GeluLinear(torch.autograd.Function):
    """Keeps x, and not the two products [B, T, F] behind it; with a = GELU(x), u = z a and y = W u + b,

    dW = dy u^T,   du = W^T dy,   dz = sum du a,   dx = GELU'(x) z du.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.dtype = dtype = products.compute_dtype(x)
        ctx.save_for_backward(x, gate, weight)  # not what it is rounded to under autocast: that is soon done again
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            inner = F.gelu(x).to(dtype)
            if gate is not None:
                inner.mul_(gate.to(dtype))
            return products.product(inner, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        dtype = ctx.dtype
        rows = grad.flatten(0, -2)  # [B * T, C]
        activated = F.gelu(x).to(dtype)
        inner = activated if gate is None else activated * gate.to(dtype)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = products.weight_gradient(rows, inner.flatten(0, -2)).to(weight.dtype)
        grad_bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        grad_inner = products.product(rows, weight.to(dtype).t()).view(x.shape)
        grad_gate = None
        if gate is not None:
            if ctx.needs_input_grad[1]:
                grad_gate = torch.mul(grad_inner, activated, out=inner).flatten(0, -2).sum(0).to(gate.dtype)
            grad_inner = grad_inner.mul_(gate.to(dtype))
        grad_x = _through_gelu(grad_inner.to(x.dtype), x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_gate, grad_weight, grad_bias


class _GeluConv(torch.autograd.Function):
    """Keeps x, and not GELU(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:  # type: ignore[override]
        ctx.dtype = dtype = products.compute_dtype(x)
        ctx.save_for_backward(x, weight)
        frames = x.transpose(1, 2).contiguous()  # [B, C_in, T_in] -> [B, T_in, C_in], as the layer before holds it
        ctx.bias_dtype, ctx.stride = None if bias is None else bias.dtype, stride
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return convolutions.conv_product(F.gelu(frames).to(dtype), weight.to(dtype), bias, stride).transpose(1, 2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        frames, grad = x.transpose(1, 2).contiguous(), grad.transpose(1, 2).contiguous()
        needs = ctx.needs_input_grad
        grad_x = grad_weight = None
        grad_bias = grad.flatten(0, 1).sum(0).to(ctx.bias_dtype) if needs[2] else None
        if needs[1]:
            activated = F.gelu(frames).to(ctx.dtype)
            grad_weight = convolutions.conv_weight_gradient(grad, activated, weight.shape[2], ctx.stride).to(
                weight.dtype
            )
            del activated
        if needs[0]:
            grad_x = convolutions.conv_input_gradient(grad, weight.to(ctx.dtype), ctx.stride, frames.shape[1])
            grad_x = _through_gelu(grad_x.to(frames.dtype), frames).transpose(1, 2)
        return grad_x, grad_weight, grad_bias, None
