"""Multi-head self-attention whose number of heads and head width are free of the model width."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V per head, then `out_proj`  (Vaswani et al., 2017, eq. 1).

    Parameter names are fairseq's (``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``); the projections are ordinary
    modules that are called, so that a swapped-in Linear takes part.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        inner = num_heads * head_dim
        self.q_proj = bert_linear(embed_dim, inner)
        self.k_proj = bert_linear(embed_dim, inner)
        self.v_proj = bert_linear(embed_dim, inner)
        self.out_proj = bert_linear(inner, embed_dim)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: [B, T, C]
            attention_mask: [B, 1, 1, T] bool, True = may be attended to; None = everything.
            gate: scales each head's context in front of `out_proj`, [H].
        Returns:
            [B, T, C]
        """
        if self.num_heads == 0:  # every head was pruned: what is left is the bias
            return self.out_proj.bias.to(x.dtype).expand_as(x)
        batch, frames, _ = x.shape
        shape = (batch, frames, self.num_heads, self.head_dim)
        # [B, T, H*D] -> [B, H, T, D]
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, dropout_p=self.dropout if self.training else 0.0
        )
        if gate is not None:
            context = context * gate.to(context.dtype)[:, None, None]
        # [B, H, T, D] -> [B, T, H*D]
        return self.out_proj(context.transpose(1, 2).reshape(batch, frames, self.num_heads * self.head_dim))


def bert_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear with BERT's initialisation (normal, std 0.02, zero bias); a side of 0 is allowed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = nn.Linear(in_features, out_features)
    if layer.weight.numel() > 0:
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def attention_mask_from_padding(padding_mask: Tensor | None) -> Tensor | None:
    """[B, T] True = padding -> [B, 1, 1, T] True = may be attended to."""
    return None if padding_mask is None else torch.logical_not(padding_mask)[:, None, None, :]
