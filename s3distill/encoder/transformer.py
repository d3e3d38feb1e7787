"""The context network: positional convolution and Transformer layers, pre- or post-LN, with optional gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3distill.encoder.attention import SelfAttention, attention_mask_from_padding, bert_linear
from s3distill.encoder.config import EncoderConfig, LayerConfig, TrainingConfig
from s3distill.encoder.efficient_attention import build_attention
from s3distill.encoder.layers import LayerNorm, activation_function
from s3distill.encoder.position_bias import RelativePositionBias
from s3distill.encoder.variants import PARTS, keeps_map, owner
from s3distill.gates.values import GateValues


class WeightNormConv(nn.Module):
    """wav2vec 2.0's positional Conv1d, weight-normed over everything but the kernel position (``dim=2``).

    Keys are those of the checkpoints (``weight_g`` [1, 1, K], ``weight_v`` [C, C/groups, K], ``bias`` [C]).
    """

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        weight = torch.empty(channels, channels // groups, kernel)
        nn.init.normal_(weight, std=(4.0 / (kernel * channels)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)

    @property
    def weight(self) -> Tensor:
        """g * v / ||v||, [C, C/groups, K]  (Salimans & Kingma, 2016, eq. 2)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]"""
        return _same_length(
            F.conv1d(x, self.weight, self.bias, padding=self.kernel // 2, groups=self.groups), self.kernel
        )


def _same_length(x: Tensor, kernel: int) -> Tensor:
    """An even kernel with padding K // 2 makes one frame too many; the last one goes, as in fairseq's SamePad."""
    return x[:, :, :-1] if kernel % 2 == 0 else x


class PositionalConv(nn.ModuleList):
    """Adds relative positions: conv -> (affine-free LayerNorm, if stacked) -> GELU.

    Depth 1 is wav2vec 2.0's; a stack of ``depth`` plain convs with kernel max(3, K // depth) is data2vec's
    (Baevski et al., 2022, section 4.2). Padded frames are zeroed in front of every conv, so that padding cannot leak
    into valid frames through the stack (fairseq zeroes only in front of the first).
    """

    def __init__(self, config: EncoderConfig) -> None:
        channels, groups, depth = config.embed_dim, config.pos_conv_groups, config.pos_conv_depth
        self.depth = depth
        if depth == 1:
            super().__init__([WeightNormConv(channels, config.pos_conv_kernel, groups)])
            return
        kernel = max(3, config.pos_conv_kernel // depth)
        super().__init__(
            nn.Sequential(nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """[B, T, C] (padded frames already zero) -> [B, T, C]"""
        x = x.transpose(1, 2)  # [B, C, T]
        if self.depth == 1:
            return F.gelu(self[0](x)).transpose(1, 2)
        for i, block in enumerate(self):
            if i > 0 and padding_mask is not None:
                x = x.masked_fill(padding_mask[:, None, :], 0)
            x = _same_length(block(x), block[0].kernel_size[0])  # type: ignore[index]
            x = F.gelu(F.layer_norm(x.transpose(1, 2), (x.shape[1],))).transpose(1, 2)
        return x.transpose(1, 2)


class TransformerLayer(nn.Module):
    """One layer; either sub-layer may be absent (`LayerConfig.attention`, `LayerConfig.ffn`).

    post-LN: x = LN_1(x + z_a * Attention(x));  x = LN_2(x + z_f * FFN(x))
    pre-LN:  x = x + z_a * Attention(LN_1(x));  x = x + z_f * FFN(LN_2(x))

    In a post-LN layer without a sub-layer its LayerNorm stays, since LN(x + 0) is still a function; in a pre-LN layer it goes.

    Args:
        owned: of `variants.PARTS`, those whose parameters are this layer's own; the others are lent to it by another layer.
    """

    def __init__(
        self, config: EncoderConfig, layer: LayerConfig, training: TrainingConfig, owned: Sequence[str] = PARTS
    ) -> None:
        super().__init__()
        self.owned = tuple(owned)
        self.layer_norm_first = config.layer_norm_first
        self.activation = activation_function(config.activation)
        self.dropout, self.activation_dropout = training.dropout, training.activation_dropout
        dim = config.embed_dim
        self.self_attn: SelfAttention | None = None
        self.self_attn_layer_norm: LayerNorm | None = None
        self.fc1: nn.Linear | None = None
        self.fc2: nn.Linear | None = None
        self.final_layer_norm: LayerNorm | None = None
        if layer.attention and "attention" in owned:
            self.self_attn = build_attention(config, layer, training.attention_dropout)
        if (layer.attention or not self.layer_norm_first) and "norms" in owned:
            self.self_attn_layer_norm = LayerNorm(dim)
        if layer.ffn and "ffn" in owned:
            self.fc1, self.fc2 = bert_linear(dim, layer.ffn_dim), bert_linear(layer.ffn_dim, dim)
        if (layer.ffn or not self.layer_norm_first) and "norms" in owned:
            self.final_layer_norm = LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        head_gate: Tensor | None = None,
        ffn_gate: Tensor | None = None,
        attention_gate: Tensor | None = None,
        ffn_layer_gate: Tensor | None = None,
        position_bias: Tensor | None = None,
        attention_map: Tensor | None = None,
        lender: TransformerLayer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> (x [B, T, C], output of the FFN before the residual [B, T, C]).

        Gates: ``head_gate`` [H], ``ffn_gate`` [F], ``attention_gate`` and ``ffn_layer_gate`` [] (whole sub-layers, bias included).
        ``position_bias`` is the encoder's, [H_unpruned, T, T]; ``attention_map`` [B, H, T, T], if any, is applied in place of the
        layer's own; ``lender`` is the layer whose parameters stand in for those that are not ``owned``.
        """
        attention, ffn, norms = (self if part in self.owned else lender for part in PARTS)
        assert attention is not None and ffn is not None and norms is not None
        residual = x
        if attention.self_attn is not None:
            assert norms.self_attn_layer_norm is not None
            inner = norms.self_attn_layer_norm(x) if self.layer_norm_first else x
            inner = attention.self_attn(inner, attention_mask, head_gate, position_bias, attention_map)
            if attention_gate is not None:
                inner = inner * attention_gate.to(inner.dtype)
            x = residual + F.dropout(inner, self.dropout, self.training)
        if not self.layer_norm_first:
            assert norms.self_attn_layer_norm is not None
            x = norms.self_attn_layer_norm(x)

        residual = x
        ffn_output = torch.zeros_like(x) if ffn.fc1 is None else x
        if ffn.fc1 is not None:
            assert ffn.fc2 is not None and norms.final_layer_norm is not None
            inner = norms.final_layer_norm(x) if self.layer_norm_first else x
            inner = self.activation(ffn.fc1(inner))
            if ffn_gate is not None:
                inner = inner * ffn_gate.to(inner.dtype)
            ffn_output = ffn.fc2(F.dropout(inner, self.activation_dropout, self.training))
            if ffn_layer_gate is not None:
                ffn_output = ffn_output * ffn_layer_gate.to(ffn_output.dtype)
            x = residual + F.dropout(ffn_output, self.dropout, self.training)
        if not self.layer_norm_first:
            assert norms.final_layer_norm is not None
            x = norms.final_layer_norm(x)
        return x, ffn_output

    def attention_map(self, x: Tensor, attention_mask: Tensor | None, position_bias: Tensor | None) -> Tensor:
        """The attention map of this layer for its input ``x`` [B, T, C], [B, H, T, T]; arguments as in `forward`."""
        assert self.self_attn is not None and self.self_attn_layer_norm is not None
        inner = self.self_attn_layer_norm(x) if self.layer_norm_first else x
        return self.self_attn.attention_map(inner, attention_mask, position_bias)


class Transformer(nn.Module):
    """Positional convolution and layers, under fairseq's keys (``pos_conv``, ``layers.N``, ``layer_norm``).

    The position bias of a WavLM is computed once per pass, for all layers. The time reduction (``time_reduction``, a Conv1d)
    stands behind the positional convolution and directly in front of the layers, as in FitHuBERT (Lee et al., 2022).
    """

    def __init__(self, config: EncoderConfig, training: TrainingConfig) -> None:
        super().__init__()
        self.layer_norm_first = config.layer_norm_first
        self.dropout, self.layerdrop = training.dropout, training.layerdrop
        self.checkpoint_activations = training.checkpoint_activations
        self.pos_conv = PositionalConv(config)
        owners = [tuple(owner(config, part, i) for part in PARTS) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(
            TransformerLayer(config, layer, training, [p for p, o in zip(PARTS, owners[i], strict=True) if o == i])
            for i, layer in enumerate(config.layers)
        )
        self.lenders = [min(numbers) for numbers in owners]
        self.keeps_map = [keeps_map(config, i) for i in range(config.num_layers)]
        self.reuses_map = [layer.reuses_attention for layer in config.layers]
        self.layer_norm = LayerNorm(config.embed_dim)
        self.time_reduction: nn.Conv1d | None = None
        if config.time_reduction > 1:
            self.time_reduction = nn.Conv1d(
                config.embed_dim, config.embed_dim, config.time_reduction, stride=config.time_reduction
            )
        self.relative_attention_bias: RelativePositionBias | None = None
        if config.position_buckets > 0:
            self.relative_attention_bias = RelativePositionBias(
                config.position_buckets, config.position_max_distance, config.position_heads
            )

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        gates: GateValues | None = None,
        num_layers: int | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs the layers.

        Args:
            x: projected features, [B, T, C].
            padding_mask: [B, T], True = padding, or None.
            num_layers: stop after this many layers; None runs all.
        Returns:
            hidden states (what enters the first layer, then each layer's output; L+1 tensors [B, T, C], T the reduced number of
            frames, see `reduce_mask`) and each layer's FFN output before the residual (L tensors [B, T, C]). A layer that
            LayerDrop skips repeats its input; its attention map, if a later layer applies it, is that of its input.
        """
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[:, :, None], 0)
        x = x + self.pos_conv(x, padding_mask)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = F.dropout(x, self.dropout, self.training)
        if self.time_reduction is not None:
            x = self.time_reduction(x.transpose(1, 2)).transpose(1, 2)  # [B, T, C] -> [B, C, T] -> [B, T // r, C]
        attention_mask = attention_mask_from_padding(self.reduce_mask(padding_mask))
        position_bias = None if self.relative_attention_bias is None else self.relative_attention_bias(x.shape[1])
        attention_map: Tensor | None = None
        hidden_states, ffn_outputs = [x], []
        for i, layer in enumerate(self.layers[:num_layers]):
            if self.keeps_map[i]:
                assert isinstance(layer, TransformerLayer)
                attention_map = self._run(layer.attention_map, x, attention_mask, position_bias)
            # torch's generator is seeded per update by the trainer, so a resumed run drops the same layers
            if self.training and self.layerdrop > 0 and torch.rand(()).item() < self.layerdrop:
                hidden_states.append(x)
                ffn_outputs.append(torch.zeros_like(x))
                continue
            applied = attention_map if self.keeps_map[i] or self.reuses_map[i] else None
            layer_gates = gates.layer(i) if gates is not None else (None,) * 4
            inputs = (x, attention_mask, *layer_gates, position_bias, applied, self.layers[self.lenders[i]])
            x, ffn_output = self._run(layer, *inputs)
            hidden_states.append(x)
            ffn_outputs.append(ffn_output)
        return hidden_states, ffn_outputs

    def reduce_mask(self, padding_mask: Tensor | None) -> Tensor | None:
        """Padding mask [B, T] of the extractor's frames -> that of the hidden states, [B, T // r].

        A frame that is made of r others is padding where the last of them is: audio is padded at its end.
        """
        if padding_mask is None or self.time_reduction is None:
            return padding_mask
        stride = self.time_reduction.stride[0]
        return padding_mask[:, stride - 1 :: stride]

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, whose activations are not kept where they are to be computed again in the backward pass."""
        if self.checkpoint_activations and self.training:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)
