"""WavLM's gated relative position bias: one table of distances for the whole encoder, gated anew in every layer.

The table stands beside the layers, under ``encoder.relative_attention_bias.weight`` (released files hold it in layer 0's
attention), so that a pruned encoder keeps it whatever becomes of layer 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def relative_position_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Distances in frames -> buckets  (Chen et al., 2022; T5's, in both directions).

    Half of the buckets are for keys behind the query. Of each half, the lower half are single distances 0, 1, ..., the
    upper half grow logarithmically up to ``max_distance``, from where all distances share the last one.

    Args:
        distance: key position - query position, int64, any shape.
    Returns:
        In 0 to ``num_buckets`` - 1, int64, the shape of ``distance``.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    # in float32, as in the released code: the truncation below depends on it
    share = torch.log(size.float() / exact) / math.log(max_distance / exact)
    far = (exact + share * (half - exact)).to(torch.int64).clamp_max(half - 1)
    return (distance > 0).to(torch.int64) * half + torch.where(size < exact, size, far)


class RelativePositionBias(nn.Module):
    """The table d of all layers, ``weight`` [buckets, H], H = heads of the unpruned model."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads).normal_(std=0.02))

    def forward(self, num_frames: int) -> Tensor:
        """d_{|i - j|} for query i and key j, [H, T, T]."""
        # buckets of the 2T - 1 distances and not of T^2 pairs, then copies of their values: a tenth of the time backwards
        distance = torch.arange(1 - num_frames, num_frames, device=self.weight.device)
        buckets = relative_position_buckets(distance, len(self.weight), self.max_distance)
        values = self.weight[buckets].t().contiguous()  # [H, 2T-1]
        frame = torch.arange(num_frames, device=self.weight.device)
        index = frame[None, :] - frame[:, None] + (num_frames - 1)  # [T, T], query by key
        return values.index_select(1, index.flatten()).view(-1, num_frames, num_frames)


def position_gate(projected: Tensor, scale: Tensor) -> Tensor:
    """How strongly each head applies the bias at each query  (Chen et al., 2022, gated relative position bias).

        r = d + g_update d + (1 - g_update) s g_reset d = d (2 - a + a s g_reset),   a = 1 - g_update

    with a, g_reset = sigmoid of what the head's slice of the layer's input is projected to. As released, each is the sum of
    four outputs of ``grep_linear``, and the projection of a is trained, not that of g_update.

    Args:
        projected: outputs of ``grep_linear``, [B, H, T, 8].
        scale: s, [1, H, 1, 1].
    Returns:
        r / d, [B, H, T, 1].
    """
    a, reset = projected.unflatten(-1, (2, 4)).sum(-1).sigmoid().split(1, dim=-1)  # [B, H, T, 8] -> [B, H, T, 2]
    return a * (reset * scale - 1) + 2


def additive_mask(gate: Tensor, bias: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: the gated bias, and -inf where nothing may be attended to, [B, H, T, T].

    Args:
        gate: [B, H, T, 1], see `position_gate`.
        bias: [H, T, T].
        attention_mask: [B, 1, 1, T] bool, True = may be attended to; None = everything.
        dtype: of queries and keys, which the kernels want here too.
    """
    mask = gate.to(dtype) * bias.to(dtype)
    if attention_mask is not None:
        mask.masked_fill_(
            ~attention_mask, -torch.inf
        )  # in place: the product is large, and its gradient does not need it
    return mask
