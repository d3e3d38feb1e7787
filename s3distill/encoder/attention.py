"""Multi-head self-attention whose number of heads and head width are free of the model width."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill import products
from s3distill.encoder.dropout import attention_with_dropout, dropout
from s3distill.encoder.position_bias import additive_mask, position_gate
from s3distill.products import Linear

_LARGEST_MAP = 2**25  # elements


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V per head, then `out_proj`  (Vaswani et al., 2017, eq. 1).

    Parameter names are fairseq's (``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``); the projections are ordinary
    modules that are called, so that a swapped-in Linear takes part.

    Args:
        position_heads: which heads of the unpruned model these are, where the encoder has a position bias (WavLM), else
            None; then also ``grep_linear`` and ``grep_a``, see `position_gate`.
        num_position_heads: how many heads the unpruned model has.
        position_channels, position_slice: of a stream that was cut, see `EncoderConfig`.
        reuses_map: the layer applies an attention map that another one computed, and has no ``q_proj`` and ``k_proj``.
    """

    position_indices: Tensor | None
    position_sources: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        position_heads: tuple[int, ...] | None = None,
        num_position_heads: int = 0,
        position_channels: tuple[int, ...] | None = None,
        position_slice: int = 0,
        reuses_map: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        inner = num_heads * head_dim
        self.q_proj = None if reuses_map else bert_linear(embed_dim, inner)
        self.k_proj = None if reuses_map else bert_linear(embed_dim, inner)
        self.v_proj = bert_linear(embed_dim, inner)
        self.out_proj = bert_linear(inner, embed_dim)
        self.num_position_heads = num_position_heads
        self.grep_linear: nn.Linear | None = None
        if position_heads is not None and not reuses_map:
            self.grep_linear = bert_linear(position_slice or embed_dim // num_position_heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))
        cut = position_heads is not None and position_heads != tuple(range(num_position_heads))
        # no part of the checkpoint: the config says it
        self.register_buffer(
            "position_indices", torch.tensor(position_heads, dtype=torch.long) if cut else None, persistent=False
        )
        sources = None
        if position_channels is not None and position_heads is not None:
            # of each channel of the unpruned stream, where it is now; behind the last where it was cut
            sources = torch.full((num_position_heads * position_slice,), embed_dim)
            sources[torch.tensor(position_channels)] = torch.arange(embed_dim)
        self.register_buffer("position_sources", sources, persistent=False)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        gate: Tensor | None = None,
        position_bias: Tensor | None = None,
        attention_map: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: [B, T, C]
            attention_mask: [B, 1, 1, T] bool, True = may be attended to; None = everything.
            gate: scales each head's context in front of `out_proj`, [H].
            position_bias: the encoder's, for all heads of the unpruned model, [H_unpruned, T, T].
            attention_map: what `attention_map` of this or another layer gave, [B, H, T, T]; it is applied as it is.
        Returns:
            [B, T, C]
        """
        if self.num_heads == 0:  # every head was pruned: what is left is the bias
            return self.out_proj.bias.to(x.dtype).expand_as(x)
        batch, frames, _ = x.shape
        if attention_map is None:
            assert self.q_proj is not None and self.k_proj is not None, "a layer that reuses a map must be given it"
            projected = products.linears(x, (self.q_proj, self.k_proj, self.v_proj))
            q, k, v = (self._split(part) for part in projected)
            if position_bias is not None:
                attention_mask = self._add_position_bias(x, position_bias, attention_mask, q.dtype)
            context = self.attend(q, k, v, attention_mask)
        else:
            v = self._heads(self.v_proj, x)
            context = dropout(attention_map, self.dropout, self.training).to(v.dtype) @ v
        if gate is not None:
            context = context * gate.to(context.dtype)[:, None, None]
        # [B, H, T, D] -> [B, T, H*D]
        return self.out_proj(context.transpose(1, 2).reshape(batch, frames, self.num_heads * self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Queries, keys and values [B, H, T, D] -> context [B, H, T, D]; the mask is bool or added to the scores."""
        if self.training and self.dropout > 0:
            return attention_with_dropout(q, k, v, attention_mask, self.dropout)
        if attention_mask is None and _is_small(q):
            return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)

    def attention_map(
        self, x: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None
    ) -> Tensor:
        """softmax(Q K^T / sqrt(head_dim) + position bias), without dropout, which each layer draws anew; arguments as in `forward`.

        Returns:
            [B, H, T, T], query by key, in the type of the queries.
        """
        q, k = self._heads(self.q_proj, x), self._heads(self.k_proj, x)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        if position_bias is not None:
            scores = scores + self._add_position_bias(x, position_bias, attention_mask, q.dtype)
        elif attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        return scores.float().softmax(-1).to(q.dtype)

    def _heads(self, projection: nn.Linear | None, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, H*D] -> [B, H, T, D]"""
        assert projection is not None, "a layer that reuses a map must be given it"
        return self._split(projection(x))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, H*D] -> [B, H, T, D]"""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _add_position_bias(self, x: Tensor, bias: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gated bias of this layer's heads as an additive mask, [B, H, T, T]."""
        assert self.grep_linear is not None
        if self.position_sources is not None:  # [B, T, C] -> [B, T, C_unpruned], 0 where the channel was cut
            x = F.pad(x, (0, 1)).index_select(-1, self.position_sources)
        slices = x.unflatten(-1, (self.num_position_heads, -1))  # [B, T, C] -> [B, T, H_unpruned, C/H_unpruned]
        if self.position_indices is not None:
            slices, bias = slices.index_select(2, self.position_indices), bias.index_select(0, self.position_indices)
        gate = position_gate(self.grep_linear(slices).transpose(1, 2), self.grep_a)
        return additive_mask(gate, bias, attention_mask, dtype)


def _is_small(q: Tensor) -> bool:
    """Whether attention in bfloat16 on a CPU takes the map [B, H, T, T] in memory: 0.5 to 0.8 of the time of torch's fused one."""
    batch, heads, frames, _ = q.shape
    small = q.dtype == torch.bfloat16 and batch * heads * frames**2 <= _LARGEST_MAP
    return small and products.is_eager_on_cpu(q) and not products.needs_gradient(q)


def bert_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear with BERT's initialisation (normal, std 0.02, zero bias); a side of 0 is allowed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = Linear(in_features, out_features)
    if layer.weight.numel() > 0:
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def attention_mask_from_padding(padding_mask: Tensor | None) -> Tensor | None:
    """[B, T] True = padding -> [B, 1, 1, T] True = may be attended to."""
    return None if padding_mask is None else torch.logical_not(padding_mask)[:, None, None, :]
