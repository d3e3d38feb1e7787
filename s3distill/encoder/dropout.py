"""Dropout, and attention with dropout, as a training step on a CPU wants them: cheap random numbers, and little kept for backward.

torch draws one double per element on one thread of a CPU, 4% of a distillation step, and its attention with dropout keeps
three float tensors [B, H, T, T] per layer. On other devices, in graphs and in evaluation torch's own functions are called.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEVELS = 2**16  # 16 random bits decide on each element


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """y = x * m / (1 - p), m ~ Bernoulli(1 - p)  (Srivastava et al., 2014, section 4).

    On a CPU p is rounded to a multiple of 2^-16, and y is divided by what is kept then.

    Args:
        x: any shape.
        p: probability that an element becomes 0, in [0, 1].
    """
    if not training or not _rounds(p) or not _is_ours(x):
        return F.dropout(x, p, training)
    result: Tensor = _Dropout.apply(x, p)
    return result


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """dropout(softmax(Q K^T / sqrt(D) + mask)) V, for training.

    Args:
        q, k, v: [B, H, T, D] each; of keys and values T may be another number.
        mask: broadcast to [B, H, T, T_k]: bool, True = may be attended to, or added to the scores; None = everything. A query
            without a key, as in a row that is all padding, gives 0, and gradients of 0.
        p: of dropout.
    Returns:
        [B, H, T, D]
    """
    if not _rounds(p) or not _is_ours(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise ValueError(f"queries, keys and values must have one type, but have {q.dtype}, {k.dtype} and {v.dtype}")
    result: Tensor = _DroppedAttention.apply(q, k, v, mask, p)
    return result


def _rounds(p: float) -> bool:
    """Whether ``p`` is a probability that 16 bits can tell from 0 and 1."""
    return 0 < round(p * _LEVELS) < _LEVELS


def _is_ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _draw(like: Tensor, p: float) -> tuple[Tensor, float]:
    """1 (kept) or 0, int8, in the shape of ``like``, seeded by torch's generator; and 1 / share that is kept on average."""
    dropped = round(p * _LEVELS)
    seed = int(torch.randint(2**63 - 1, ()))
    # one 64-bit number for four elements, in 0.6 of the time that torch's generator takes
    bits = torch.from_numpy(np.random.SFC64(seed).random_raw(math.ceil(like.numel() / 4)).view(np.int16))
    kept = bits[: like.numel()] >= dropped - _LEVELS // 2
    return kept.view(torch.int8).view(like.shape), _LEVELS / (_LEVELS - dropped)


class _Dropout(torch.autograd.Function):
    """Keeps one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:  # type: ignore[override]
        kept, ctx.scale = _draw(x, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.scale), None


def _attention_map(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask), [B, H, T, T_k]; a query without a key attends to nothing."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    attention = scores.softmax(-1)
    # softmax of -inf alone is NaN
    key = mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask.amax(-1, keepdim=True) > -torch.inf
    return attention if bool(key.all()) else attention.masked_fill_(~key, 0)


class _DroppedAttention(torch.autograd.Function):
    """Keeps one byte per weight of the attention map, which is computed again in the backward pass: of long utterances it would be
    the largest part of what a layer keeps. With A = softmax(S), D = A * m / (1 - p) and C = D V,

    dV = D^T dC,   dA = dC V^T * m / (1 - p),   dS = A * (dA - sum_keys A dA),   dQ = dS K / sqrt(d),   dK = dS^T Q / sqrt(d).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:  # type: ignore[override]
        with torch.autocast("cpu", enabled=False):  # softmax of bfloat16 sums in float32 by itself
            attention = _attention_map(q, k, mask)
            kept, ctx.scale = _draw(attention, p)
            ctx.save_for_backward(q, k, v, mask, kept)
            # the scale on D values per query and not on T weights
            return attention.mul_(kept).matmul(v).mul_(ctx.scale)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # what is saved has no gradient of its own
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, kept = ctx.saved_tensors
        grad = grad * ctx.scale
        attention = _attention_map(q, k, mask)
        grad_v = (attention * kept).transpose(-2, -1) @ grad
        grad_attention = (grad @ v.transpose(-2, -1)).mul_(kept)
        grad_scores = torch._softmax_backward_data(grad_attention, attention, -1, attention.dtype)
        scale = q.shape[-1] ** -0.5
        grad_q = (grad_scores @ k).mul_(scale)
        grad_k = (grad_scores.transpose(-2, -1) @ q).mul_(scale)
        grad_mask = grad_scores.sum_to_size(mask.shape) if mask is not None and ctx.needs_input_grad[3] else None
        return grad_q, grad_k, grad_v, grad_mask, None
