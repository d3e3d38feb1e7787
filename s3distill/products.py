"""Linear on a CPU: the kernels in which its three products run fastest.

A Linear is three products: the output, and in the backward pass the gradients of input and weight. torch sends them to MKL in
float32, and to oneDNN in bfloat16. Here oneDNN takes those of float32 too, but for weight gradients with more rows than columns:
on an AMD EPYC 1.1 to 1.2 times as fast at HuBERT Base's shapes (on Intel's CPUs nobody has measured it).

On other devices and in graphs torch's own functions are called; everything here has their results up to rounding. What is called
``rows`` is [..., C], the form in which matrix products take their operands.
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

_LEAST = 2**25  # multiplications from which on a kernel of oneDNN's is worth its making, once per shape: up to 1 ms


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
    if not is_ours(x) or kernels.is_autocast(x.device) or not has_kernel(x, weight):
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
    separate = len(plain) < len(modules) or not is_ours(x) or not kernels.is_autocast(x.device)
    if separate or not needs_gradient(x, *weights, *biases):
        return tuple(module(x) for module in modules)
    stacked: Tensor = _Linears.apply(x, *weights, *biases)
    return stacked.split([len(weight) for weight in weights], -1)


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
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight) if _can_freeze(weight) else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self._weight if self._weight.layout == torch.strided else self._weight.to_dense()
        self._pack(fn(weight))
        result: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result


def freeze_linears(root: nn.Module) -> None:
    """Puts `FrozenLinear` in place of every `Linear` below ``root`` that has a kernel on this machine."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and is_plain(child, Linear) and _can_freeze(child.weight):
                setattr(module, name, FrozenLinear(child))


def _can_freeze(weight: Tensor) -> bool:
    typical = weight.new_empty(1, weight.shape[1]).expand(256, -1)  # frames of five seconds
    return weight.device.type == "cpu" and has_kernel(typical, weight)


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module is of one of these types, not of a subclass, and has no hooks: only then may its call be replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) in kinds and not any(hooks)


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


def is_ours(x: Tensor) -> bool:
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


def report() -> kernels.KernelReport:
    """What products run on, on a CPU."""
    if _onednn_product() is None:
        return kernels.KernelReport(
            "product", False, "torch linear", "this torch has no oneDNN product for this machine"
        )
    types = "float32 and bfloat16" if _has_bfloat16() else "float32"
    return kernels.KernelReport("product", False, f"oneDNN's, {types}, on a CPU", "torch has it; GPUs take torch's own")


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x [..., C_in] and weight [C, C_in, ...] is oneDNN's here, and not torch's choice.

    In bfloat16 that is oneDNN's too, by way of `torch.addmm`, which is slower where a weight lies in memory as Linears have it.
    """
    if x.dtype != weight.dtype or weight.numel() == 0 or x.numel() * len(weight) < _LEAST:
        return False
    if not torch.backends.mkldnn.enabled or _onednn_product() is None:  # type: ignore[attr-defined]
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and weight.is_contiguous() and _has_bfloat16())


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows W^T + b, [..., C_in] x [C, C_in] -> [..., C], without autograd."""
    if not has_kernel(rows, weight):
        return F.linear(rows, weight, bias)
    kernel = _onednn_product()
    assert kernel is not None
    return kernel(rows, weight, bias, "none", [], "")


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """grad^T rows, [N, C] x [N, C_in] -> [C, C_in]: the gradient of a Linear's weight."""
    if rows.shape[1] > grad.shape[1] and rows.dtype == torch.float32:
        return product(grad.t(), rows.t())
    return grad.t() @ rows


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
