"""Linear and Conv1d on a CPU: the layouts and kernels in which their three products run fastest.

A Linear or a convolution is three products: the output, and in the backward pass the gradients of the input and of the
weight. For float32 torch sends those of a Linear to MKL and those of a Conv1d to oneDNN in the layout [B, C, T]. Here

- float32 products of two matrices go to oneDNN too, where torch has it: 1.1 to 1.2 times as fast on CPUs that are not Intel's;
- convolutions hold their values as [B, T, C] in memory, in the shape [B, C, T]: the input's gradient takes 0.7 of the time
  and no copy, odd numbers of channels cost little, and LayerNorm and Linear behind it read contiguous rows.

On other devices, in graphs, and for float64 where nothing is gained, torch's own functions are called; everything here has
their results up to rounding. What is called ``rows`` is [..., C], the form in which matrix products take their operands.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from s3distill import kernels

_UNFOLDED = 2**25  # elements of an unfolded input at a time, so that long waveforms need no more memory


class Linear(nn.Linear):
    """torch's Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C]"""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b.

    Args:
        x: [..., C_in]
        weight, bias: [C, C_in], [C] or None.
    Returns:
        [..., C]
    """
    if not _is_ours(x) or kernels.is_autocast(x.device) or not _has_kernel(x, weight):
        return F.linear(x, weight, bias)
    if not needs_gradient(x, weight, bias):
        return product(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What several modules give for one input; Linears under autocast on a CPU as one product, for which x is cast once.

    Args:
        x: [..., C_in]
    Returns:
        per module [..., C]
    """
    plain = [m for m in modules if isinstance(m, nn.Linear) and is_plain(m, nn.Linear, Linear) and m.bias is not None]
    weights, biases = [m.weight for m in plain], [m.bias for m in plain]
    separate = len(plain) < len(modules) or not _is_ours(x) or not kernels.is_autocast(x.device)
    if separate or not needs_gradient(x, *weights, *biases):
        return tuple(module(x) for module in modules)
    return _linears(x, weights, biases).split([len(weight) for weight in weights], -1)


def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    result: Tensor = _Linears.apply(x, *weights, *biases)
    return result


class FrozenLinear(nn.Module):
    """A Linear that will not learn, its weight in the order in which oneDNN reads it: 0.9 of the time in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._pack(linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C]"""
        kernel = _onednn_product()
        if kernel is None or self._weight.layout == torch.strided:
            return F.linear(x, self._weight, self.bias)  # type: ignore[arg-type]
        return kernel(x, self._weight, self.bias, "none", [], "")

    def _pack(self, weight: Tensor) -> None:
        # no buffer: torch can neither move nor save what has oneDNN's order
        packs = weight.device.type == "cpu" and _has_kernel(weight, weight)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight) if packs else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self._weight if self._weight.layout == torch.strided else self._weight.to_dense()
        self._pack(fn(weight))
        result: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result


def freeze_linears(root: nn.Module) -> None:
    """Puts `FrozenLinear` in place of every `Linear` below ``root`` that has a kernel on this machine."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if is_plain(child, Linear) and _has_kernel(child.weight, child.weight):  # type: ignore[arg-type]
                setattr(module, name, FrozenLinear(child))  # type: ignore[arg-type]


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module is of one of these types, not of a subclass, and has no hooks: only then may its call be replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) in kinds and not any(hooks)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """A convolution without padding, groups or dilation.

    Args:
        x: [B, C_in, T_in]
        weight, bias: [C, C_in, K], [C] or None.
    Returns:
        [B, C, T], T = (T_in - K) // stride + 1.
    """
    if not _is_ours(x):
        return F.conv1d(x, weight, bias, stride)
    dtype = compute_dtype(x)
    if not needs_gradient(x, weight, bias):
        frames = x.to(dtype).transpose(1, 2).contiguous()
        return conv_product(frames, weight.to(dtype), None if bias is None else bias.to(dtype), stride).transpose(1, 2)
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
    if not _is_ours(x):
        return F.conv1d(x, weight, bias, padding=padding, groups=groups)
    if not needs_gradient(x, weight, bias):
        image, kernel = _grouped_operands(x, weight)
        with kernels.without_autocast(x.device):
            bias = None if bias is None else bias.to(image.dtype)
            return F.conv2d(image, kernel, bias, padding=(0, padding), groups=groups).squeeze(2)
    result: Tensor = _GroupedConv.apply(x, weight, bias, padding, groups)
    return result


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a product of ``x`` is computed in: under autocast its type."""
    return torch.get_autocast_dtype(x.device.type) if kernels.is_autocast(x.device) else x.dtype


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is on a CPU and nothing is being traced or compiled: graphs hold torch's own operations."""
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return x.device.type == "cpu" and not graph


def _is_ours(x: Tensor) -> bool:
    return is_eager_on_cpu(x) and x.is_floating_point() and x.numel() > 0


@functools.cache
def _onednn_product() -> Callable[..., Tensor] | None:
    """oneDNN's product of matrices, which torch has for what torch.compile makes on a CPU; None where it lacks it."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    found: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found


if (_kernel := _onednn_product()) is not None:  # torch's own counter of operations does not know it
    register_flop_formula(_kernel)(lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0])


@functools.cache
def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU: it takes AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these is oneDNN's here, and not torch's choice.

    In bfloat16 that is oneDNN's too, by way of `torch.addmm`, which is slower where a weight lies in memory as Linears have it.
    """
    if x.dtype != weight.dtype or x.numel() == 0 or weight.numel() == 0:
        return False
    if not torch.backends.mkldnn.enabled or _onednn_product() is None:  # type: ignore[attr-defined]
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and weight.is_contiguous() and _has_bfloat16())


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows W^T + b, [..., C_in] x [C, C_in] -> [..., C], without autograd."""
    if not _has_kernel(rows, weight):
        return F.linear(rows, weight, bias)
    kernel = _onednn_product()
    assert kernel is not None
    return kernel(rows, weight, bias, "none", [], "")


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """grad^T rows, [N, C] x [N, C_in] -> [C, C_in]: the gradient of a Linear's weight."""
    if rows.shape[1] > grad.shape[1] and rows.dtype == torch.float32 and _has_kernel(grad, rows):
        return product(grad.t(), rows.t())
    return grad.t() @ rows


def conv_product(frames: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution of frames [B, T_in, C_in] with a weight [C, C_in, K] -> [B, T, C], without autograd."""
    kernel = weight.shape[2]
    if weight.shape[1] > 1 and (frames.dtype != torch.float32 or not _has_kernel(frames, weight)):
        frames_last = F.conv2d(_as_image(frames), weight.unsqueeze(2), bias, (1, stride))
        return frames_last.squeeze(2).transpose(1, 2).contiguous()
    flat = weight.transpose(1, 2).flatten(1)  # [C, C_in, K] -> [C, K * C_in]
    if kernel == 1:
        return product(frames[:, ::stride], flat, bias)
    windows = _windows(frames, kernel, stride)  # [B, T, K * C_in], overlapping
    if windows.numel() <= _UNFOLDED:
        return product(windows.contiguous(), flat, bias)
    result = frames.new_empty(*windows.shape[:2], len(weight))
    at_once = max(1, _UNFOLDED // windows.shape[2])
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
        if windows.numel() <= _UNFOLDED:
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


class _Linear(torch.autograd.Function):
    """y = W x + b:  dx = W^T dy,  dW = dy x^T,  db = dy, summed over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight.t()) if needs[0] else None,
            weight_gradient(rows, x.flatten(0, -2)) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


class _Linears(torch.autograd.Function):
    """`_Linear` with the weights of several below one another, in the type of the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.sizes = [len(weight) for weight in weights]
        ctx.x_dtype, ctx.dtypes = x.dtype, [p.dtype for p in parameters]
        dtype = compute_dtype(x)
        weight = x.new_empty(sum(ctx.sizes), x.shape[-1], dtype=dtype)
        for target, part in zip(weight.split(ctx.sizes), weights, strict=True):
            target.copy_(part)
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, torch.cat(biases).to(dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = product(grad, weight.t()).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        grad_weights = weight_gradient(rows, x.flatten(0, -2)).split(ctx.sizes)
        found = [*grad_weights, *rows.sum(0).split(ctx.sizes)]
        needed = zip(found, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return grad_x, *(part.to(dtype) if needs else None for part, dtype, needs in needed)


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
