"""Conv1d on a CPU: values that are [B, T, C] in memory and have the shape [B, C, T].

In this order (torch's name is channels last) the gradient of the input takes 0.7 of the time that it takes in torch's usual one
and is not copied, a number of channels like 369 costs what it should, and LayerNorm and Linear behind it read contiguous rows.
In float32 a convolution is a product of its unfolded input, see `products`.

On other devices and in graphs torch's own functions are called; everything here has their results up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s3distill.products import compute_dtype, has_kernel, is_ours, product

_UNFOLDED = 2**26  # bytes of an unfolded input at a time, so that long waveforms need no more memory


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """A convolution without padding, groups or dilation.

    Args:
        x: [B, C_in, T_in]
        weight, bias: [C, C_in, K], [C] or None.
    Returns:
        [B, C, T], T = (T_in - K) // stride + 1.
    """
    if not is_ours(x):
        return F.conv1d(x, weight, bias, stride)
    result: Tensor = _Conv.apply(x, weight, bias, stride)
    return result


def grouped_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
    """The positional convolution: stride 1.

    Args:
        x: [B, C_in, T_in]
        weight, bias: [C, C_in / groups, K], [C] or None.
    Returns:
        [B, C, T], T = T_in + 2 * padding - K + 1.
    """
    if not is_ours(x):
        return F.conv1d(x, weight, bias, padding=padding, groups=groups)
    result: Tensor = _GroupedConv.apply(x, weight, bias, padding, groups)
    return result


def conv_product(frames: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution of frames [B, T_in, C_in] with a weight [C, C_in, K] -> [B, T, C], without autograd."""
    kernel = weight.shape[2]
    if weight.shape[1] > 1 and (frames.dtype != torch.float32 or not has_kernel(frames, weight)):
        frames_last = F.conv2d(_as_image(frames), weight.unsqueeze(2), bias, (1, stride))
        return frames_last.squeeze(2).transpose(1, 2).contiguous()
    flat = weight.transpose(1, 2).flatten(1)  # [C, C_in, K] -> [C, K * C_in]
    if kernel == 1:
        return product(frames[:, ::stride], flat, bias)
    windows = _windows(frames, kernel, stride)  # [B, T, K * C_in], overlapping
    if windows.numel() * windows.itemsize <= _UNFOLDED:
        return product(windows.contiguous(), flat, bias)
    result = frames.new_empty(*windows.shape[:2], len(weight))
    at_once = max(1, _UNFOLDED // (windows.shape[2] * windows.itemsize))
    for row, target in zip(windows, result, strict=True):
        for begin in range(0, len(row), at_once):
            part = slice(begin, begin + at_once)
            target[part] = product(row[part].contiguous(), flat, bias)
    return result


def conv_input_gradient(grad: Tensor, weight: Tensor, stride: int, num_frames: int) -> Tensor:
    """Gradient [B, T, C] of a convolution's output, weight [C, C_in, K] -> that of its input, [B, T_in = num_frames, C_in]."""
    unused = num_frames - (grad.shape[1] - 1) * stride - weight.shape[2]  # frames at the end that no window reaches
    result = F.conv_transpose2d(_as_image(grad), weight.unsqueeze(2), stride=(1, stride), output_padding=(0, unused))
    return result.squeeze(2).transpose(1, 2).contiguous()


def conv_weight_gradient(grad: Tensor, frames: Tensor, kernel: int, stride: int) -> Tensor:
    """Gradient [B, T, C] of a convolution's output, its input [B, T_in, C_in] -> that of its weight, [C, C_in, K].

    In float32, ``stride`` taps of the kernel at a time: their windows do not overlap, so that a matrix product reads them where
    they are. In half precision all rows at once: a sum of sums would be rounded in between.
    """
    num_windows, channels = grad.shape[1], frames.shape[2]
    if frames.dtype not in (torch.float32, torch.float64):
        windows = _windows(frames, kernel, stride)
        if windows.numel() * windows.itemsize <= _UNFOLDED:
            flat = grad.flatten(0, 1).t() @ windows.flatten(0, 1)
            return flat.unflatten(1, (kernel, channels)).transpose(1, 2)
        weight = frames.new_empty(grad.shape[2], channels, 1, kernel)
        mask = (False, True, False)
        return _conv_gradients(_as_image(grad), _as_image(frames), weight, (1, stride), mask=mask)[1].squeeze(2)
    result = grad.new_zeros(grad.shape[2], kernel * channels)
    for first in range(0, kernel, stride):
        taps = min(stride, kernel - first)
        part = result[:, first * channels : (first + taps) * channels]
        for row, row_grad in zip(frames, grad, strict=True):
            windows = row[first:].as_strided((num_windows, taps * channels), (stride * channels, 1))
            torch.addmm(part, row_grad.t(), windows, out=part)
    return result.unflatten(1, (kernel, channels)).transpose(1, 2)


def _windows(frames: Tensor, kernel: int, stride: int) -> Tensor:
    """[B, T_in, C_in] -> what each output frame sees, [B, T, K * C_in]: a view whose rows overlap."""
    frames = frames.contiguous()
    batch, num_frames, channels = frames.shape
    shape = (batch, (num_frames - kernel) // stride + 1, kernel * channels)
    return frames.as_strided(shape, (num_frames * channels, stride * channels, 1))


def _as_image(frames: Tensor) -> Tensor:
    """[B, T, C] -> [B, C, 1, T], the same memory: what torch calls channels last."""
    return frames.contiguous().transpose(1, 2).unsqueeze(2)


def _conv_gradients(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: int = 0,
    groups: int = 1,
    mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a Conv2d over [B, C, 1, T], those that ``mask`` names."""
    shape = (list(stride), [0, padding], [1, 1], False, [0, 0], groups)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, image, weight, [len(weight)], *shape, list(mask)
    )
    return found


def _grouped_operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C_in, T] and [C, C_in / groups, K] as what torch calls channels last, in the type of the product."""
    dtype = compute_dtype(x)
    return _as_image(x.to(dtype).transpose(1, 2)), grouped_weight(weight.to(dtype)).unsqueeze(2)


def grouped_weight(weight: Tensor) -> Tensor:
    """[C, C_in / groups, K], in memory as `grouped_conv1d` reads it on a CPU; the same tensor where it is so already."""
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)


class _Conv(torch.autograd.Function):
    """y = W * x + b, a correlation over time:  dx = W^T dy, spread over the windows,  dW = dy (windows of x)^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:  # type: ignore[override]
        ctx.dtype = dtype = compute_dtype(x)
        ctx.stride, ctx.bias_dtype = stride, None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            ctx.save_for_backward(x, weight)
            frames = x.to(dtype).transpose(1, 2).contiguous()
            bias = None if bias is None else bias.to(dtype)
            return conv_product(frames, weight.to(dtype), bias, stride).transpose(1, 2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        frames, grad = x.to(ctx.dtype).transpose(1, 2).contiguous(), grad.transpose(1, 2).contiguous()
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = conv_input_gradient(grad, weight.to(ctx.dtype), ctx.stride, frames.shape[1])
            grad_x = grad_x.transpose(1, 2).to(x.dtype)
        if needs[1]:
            grad_weight = conv_weight_gradient(grad, frames, weight.shape[2], ctx.stride).to(weight.dtype)
        if needs[2]:
            grad_bias = grad.flatten(0, 1).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


class _GroupedConv(torch.autograd.Function):
    """Channels last for output and input gradient, channels first for the weight's: each where it is fastest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:  # type: ignore[override]
        image, kernel = _grouped_operands(x, weight)
        ctx.save_for_backward(image, kernel)
        ctx.padding, ctx.groups = padding, groups
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(image.dtype)
            return F.conv2d(image, kernel, bias, padding=(0, padding), groups=groups).squeeze(2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, kernel = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        padding, groups = ctx.padding, ctx.groups
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            mask = (True, False, False)
            rows = _as_image(grad.transpose(1, 2))
            grad_x = _conv_gradients(rows, image, kernel, (1, 1), padding, groups, mask)[0].squeeze(2).to(x_dtype)
        if needs[1] or needs[2]:
            mask = (False, needs[1], needs[2])
            rows, image = grad.contiguous().unsqueeze(2), image.contiguous()
            kernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)  # only its shape counts here
            _, grad_weight, grad_bias = _conv_gradients(rows, image, kernel, (1, 1), padding, groups, mask)
            grad_weight = grad_weight.squeeze(2).to(weight_dtype) if needs[1] else None
            grad_bias = grad_bias.to(bias_dtype) if needs[2] else None
        return grad_x, grad_weight, grad_bias, None, None
