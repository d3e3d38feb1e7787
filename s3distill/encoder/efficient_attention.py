"""Attention that costs less than all pairs of frames: windows with global frames, and Linformer's projected keys and values.

Both have the projections, gates and keys of `SelfAttention`; only what happens between them differs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill.encoder.attention import SelfAttention
from s3distill.encoder.config import EncoderConfig, LayerConfig

_SMALLEST_BLOCK = 16  # queries; below, the matrices are too small to be fast


def build_attention(config: EncoderConfig, layer: LayerConfig, dropout: float) -> SelfAttention:
    """The attention of one layer, of the kind that ``config.attention`` names."""
    shape = (config.embed_dim, layer.num_heads, layer.head_dim, dropout)
    if config.attention == "windowed":
        return WindowedAttention(*shape, window=config.attention_window, num_global=config.attention_global)
    if config.attention == "linformer":
        return LinformerAttention(*shape, dim=config.linformer_dim, max_frames=config.linformer_max_frames)
    return SelfAttention(*shape, layer.position_heads, config.position_heads, layer.reuses_attention)


def num_pairs(num_frames: int, window: int, num_global: int) -> int:
    """(query, key) pairs that `WindowedAttention` computes for an utterance; less than ``num_frames`` squared, or that."""
    block = max(window, _SMALLEST_BLOCK)
    blocked = math.ceil(num_frames / block) * block * (block + 2 * window + num_global) + num_global * num_frames
    return min(blocked, num_frames * num_frames)


class WindowedAttention(SelfAttention):
    """Attention to ``window`` frames on each side, and to and from the first ``num_global`` frames  (Beltagy et al., 2020, section 3.1).

    Computed in blocks: each block of queries meets its own frames, ``window`` more on both sides, and the global frames. Where
    that would be no less than all pairs, which is so for short utterances, all pairs are computed and masked.

    Deviation: the projections of global frames are those of the others; the paper's Longformer has a second set.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int, dropout: float = 0.0, *, window: int, num_global: int = 0
    ) -> None:
        super().__init__(embed_dim, num_heads, head_dim, dropout)
        self.window, self.num_global = window, num_global

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Queries, keys and values [B, H, T, D], mask [B, 1, 1, T] bool, True = may be attended to -> context [B, H, T, D]."""
        frames, num_global = q.shape[2], self.num_global
        valid = torch.ones(1, frames, dtype=torch.bool, device=q.device)
        if attention_mask is not None:
            valid = attention_mask[:, 0, 0]  # [B, T]
        if num_pairs(frames, self.window, self.num_global) == frames * frames:
            return super().attend(q, k, v, self._all_pairs(valid)[:, None])
        context = self._attend_blocks(q, k, v, valid)
        if num_global == 0:
            return context
        # fewer than `frames`: else all pairs would have been no more
        whole = super().attend(q[:, :, :num_global], k, v, attention_mask)
        return torch.cat([whole, context[:, :, num_global:]], 2)

    def _all_pairs(self, valid: Tensor) -> Tensor:
        """Valid frames [B, T] -> which keys each query attends to, [B, T, T]."""
        index = torch.arange(valid.shape[1], device=valid.device)
        distance = (index[:, None] - index).abs()
        is_global = index < self.num_global
        near = (distance <= self.window) | is_global[:, None] | is_global
        # a padded query attends to itself: without any key it would be NaN, and spread from there
        return (near & valid[:, None, :]) | (distance == 0)

    def _attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """What `attend` takes -> context of all queries as if none were global, [B, H, T, D]."""
        batch, _, frames, _ = q.shape
        block, window = max(self.window, _SMALLEST_BLOCK), self.window
        num_blocks = math.ceil(frames / block)
        behind = num_blocks * block - frames  # frames that fill the last block

        def near_keys(x: Tensor) -> Tensor:
            # [B, H, T, D] -> [B, H, N, D, block + 2 window] -> [B * N, H, global + block + 2 window, D]
            blocks = F.pad(x, (0, 0, window, behind + window)).unfold(2, block + 2 * window, block)
            blocks = blocks.permute(0, 2, 1, 4, 3)
            first = x[:, None, :, : self.num_global].expand(-1, num_blocks, -1, -1, -1)
            return torch.cat([first, blocks], 3).flatten(0, 1)

        queries = F.pad(q, (0, 0, 0, behind)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
        mask = (
            self._block_mask(valid, block).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        )  # [B * N, 1, block, keys]
        context = super().attend(queries, near_keys(k), near_keys(v), mask)
        # [B * N, H, block, D] -> [B, H, N * block, D] -> [B, H, T, D]
        return context.unflatten(0, (batch, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :frames]

    def _block_mask(self, valid: Tensor, block: int) -> Tensor:
        """Valid frames [B, T] -> which of its keys each query of a block attends to, [B, N, block, global + block + 2 window]."""
        window, frames = self.window, valid.shape[1]
        num_blocks = math.ceil(frames / block)
        starts = torch.arange(num_blocks, device=valid.device) * block
        query = starts[:, None] + torch.arange(block, device=valid.device)  # [N, block], frame of each query
        key = starts[:, None] + torch.arange(-window, block + window, device=valid.device)  # [N, block + 2 window]
        distance = (key[:, None, :] - query[:, :, None]).abs()  # [N, block, block + 2 window]
        inside = (key >= self.num_global) & (key < frames)  # global keys stand in front, and must not count twice
        near = valid[:, key.clamp(0, frames - 1)] & inside  # [B, N, block + 2 window]
        own = (distance == 0) & ((key >= frames) | ~valid[:, key.clamp(0, frames - 1)])[:, :, None, :]
        local = (near[:, :, None, :] & (distance <= window)) | own
        first = valid[:, None, None, : self.num_global].expand(-1, num_blocks, block, -1)
        return torch.cat([first, local], 3)


class LinformerAttention(SelfAttention):
    """softmax(Q (E K)^T / sqrt(head_dim)) F V: k projected frames in place of T  (Wang et al., 2020, eq. 7).

    E and F are ``key_frames`` and ``value_frames``, [k, max_frames], of each layer its own and shared by its heads (the paper's
    headwise sharing). Of an utterance of T frames the first T columns act, on valid frames only. Their values start so small
    that a sum over ``max_frames`` frames has the variance of one (the paper's theorem 2 takes 1/k).
    """

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int, dropout: float = 0.0, *, dim: int, max_frames: int
    ) -> None:
        super().__init__(embed_dim, num_heads, head_dim, dropout)
        self.key_frames = nn.Parameter(torch.empty(dim, max_frames).normal_(std=max_frames**-0.5))
        self.value_frames = nn.Parameter(torch.empty(dim, max_frames).normal_(std=max_frames**-0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Queries, keys and values [B, H, T, D], mask [B, 1, 1, T] bool, True = may be attended to -> context [B, H, T, D]."""
        frames = q.shape[2]
        if attention_mask is not None:
            padded = ~attention_mask.transpose(2, 3)  # [B, 1, T, 1]
            k, v = k.masked_fill(padded, 0), v.masked_fill(padded, 0)
        # [k, T] @ [B, H, T, D] -> [B, H, k, D]
        k, v = self.key_frames[:, :frames].to(k.dtype) @ k, self.value_frames[:, :frames].to(v.dtype) @ v
        return super().attend(q, k, v, None)
