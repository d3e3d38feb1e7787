"""The context network: positional convolution and Transformer layers, pre- or post-LN, with optional gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3distill import kernels
from s3distill.encoder.attention import SelfAttention, attention_mask_from_padding, bert_linear
from s3distill.encoder.config import EncoderConfig, LayerConfig
from s3distill.encoder.dropout import dropout
from s3distill.encoder.efficient_attention import build_attention
from s3distill.encoder.layers import LayerNorm, activation_function, gated_norm
from s3distill.encoder.position_bias import RelativePositionBias
from s3distill.encoder.positional import PositionalConv
from s3distill.encoder.recompute import gelu_linear
from s3distill.encoder.training_config import TrainingConfig
from s3distill.encoder.variants import PARTS, keeps_map, owner
from s3distill.gates.values import GateValues


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
        width_gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> (x [B, T, C], output of the FFN before the residual [B, T, C]).

        Gates: ``head_gate`` [H], ``ffn_gate`` [F], ``attention_gate`` and ``ffn_layer_gate`` [] (whole sub-layers, bias included).
        ``position_bias`` is the encoder's, [H_unpruned, T, T]; ``attention_map`` [B, H, T, T], if any, is applied in place of the
        layer's own; ``lender`` is the layer whose parameters stand in for those that are not ``owned``. ``width_gate`` [C] stands
        at what is written into the stream and behind every norm over it, see `pruning.width`.
        """
        attention, ffn, norms = (self if part in self.owned else lender for part in PARTS)
        assert attention is not None and ffn is not None and norms is not None
        residual = x
        if attention.self_attn is not None:
            assert norms.self_attn_layer_norm is not None
            inner = gated_norm(norms.self_attn_layer_norm, x, width_gate) if self.layer_norm_first else x
            inner = attention.self_attn(inner, attention_mask, head_gate, position_bias, attention_map)
            if attention_gate is not None:
                inner = inner * attention_gate.to(inner.dtype)
            if width_gate is not None:
                inner = inner * width_gate.to(inner.dtype)
            x = residual + dropout(inner, self.dropout, self.training)
        if not self.layer_norm_first:
            assert norms.self_attn_layer_norm is not None
            x = gated_norm(norms.self_attn_layer_norm, x, width_gate)

        residual = x
        ffn_output = torch.zeros_like(x) if ffn.fc1 is None else x
        if ffn.fc1 is not None:
            assert ffn.fc2 is not None and norms.final_layer_norm is not None
            inner = gated_norm(norms.final_layer_norm, x, width_gate) if self.layer_norm_first else x
            ffn_output = self._ffn(ffn.fc1(inner), ffn_gate, ffn.fc2)
            if ffn_layer_gate is not None:
                ffn_output = ffn_output * ffn_layer_gate.to(ffn_output.dtype)
            if width_gate is not None:
                ffn_output = ffn_output * width_gate.to(ffn_output.dtype)
            x = residual + dropout(ffn_output, self.dropout, self.training)
        if not self.layer_norm_first:
            assert norms.final_layer_norm is not None
            x = gated_norm(norms.final_layer_norm, x, width_gate)
        return x, ffn_output

    def _ffn(self, x: Tensor, gate: Tensor | None, fc2: nn.Linear) -> Tensor:
        """From `fc1`'s output [B, T, F] on: activation, gate [F], dropout, ``fc2``; [B, T, C]."""
        drops = self.training and self.activation_dropout > 0
        if self.activation is F.gelu and not drops:
            return gelu_linear(x, gate, fc2)
        x = self.activation(x)
        if gate is not None:
            x = x * gate.to(x.dtype)
        return fc2(dropout(x, self.activation_dropout, self.training))  # type: ignore[no-any-return]

    def attention_map(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_bias: Tensor | None,
        width_gate: Tensor | None = None,
    ) -> Tensor:
        """The attention map of this layer for its input ``x`` [B, T, C], [B, H, T, T]; arguments as in `forward`."""
        assert self.self_attn is not None and self.self_attn_layer_norm is not None
        inner = gated_norm(self.self_attn_layer_norm, x, width_gate) if self.layer_norm_first else x
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
        if kernels.is_autocast(x.device):
            x = x.float()  # the residual stream, which every layer adds to: only what is added is rounded
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[:, :, None], 0)
        width_gate = gates.width if gates is not None else None
        x = x + self.pos_conv(x, padding_mask, gates.positional(self.pos_conv.written) if gates is not None else None)
        if not self.layer_norm_first:
            x = gated_norm(self.layer_norm, x, width_gate)
        x = dropout(x, self.dropout, self.training)
        if self.time_reduction is not None:
            x = self.time_reduction(x.transpose(1, 2)).transpose(1, 2)  # [B, T, C] -> [B, C, T] -> [B, T // r, C]
            if kernels.is_autocast(x.device):
                x = x.float()
            if width_gate is not None:
                x = x * width_gate.to(x.dtype)
        attention_mask = attention_mask_from_padding(self.reduce_mask(padding_mask))
        position_bias = None if self.relative_attention_bias is None else self.relative_attention_bias(x.shape[1])
        attention_map: Tensor | None = None
        hidden_states, ffn_outputs = [x], []
        for i, layer in enumerate(self.layers[:num_layers]):
            if self.keeps_map[i]:
                assert isinstance(layer, TransformerLayer)
                attention_map = self._run(layer.attention_map, x, attention_mask, position_bias, width_gate)
            # torch's generator is seeded per update by the trainer, so a resumed run drops the same layers
            if self.training and self.layerdrop > 0 and torch.rand(()).item() < self.layerdrop:
                hidden_states.append(x)
                ffn_outputs.append(torch.zeros_like(x))
                continue
            applied = attention_map if self.keeps_map[i] or self.reuses_map[i] else None
            layer_gates = gates.layer(i) if gates is not None else (None,) * 4
            lender = self.layers[self.lenders[i]]
            x, ffn_output = self._run(
                layer, x, attention_mask, *layer_gates, position_bias, applied, lender, width_gate
            )
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
