"""The waveform extractor: samples at 16 kHz to feature frames at 50 Hz, the first stage of every encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill import kernels, products
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig
from s3distill.encoder.first_layer import conv_group_norm
from s3distill.encoder.layers import LayerNorm
from s3distill.encoder.recompute import gelu_conv, gelu_over_rows


def masked_group_norm(x: Tensor, num_valid: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm with one channel per group whose statistics count the first ``num_valid`` frames of each row only.

    The invalid frames are set to c, a first estimate of the valid mean, the moments of the whole row are taken in one
    stable pass, and the constants' share is then taken out of them: with T frames of which n are valid,
    mean_n = c + T/n * (mean_T - c) and
    sum_valid (x - mean_n)^2 = T*var_T - (T - n) * (mean_T - c)^2 - n * (mean_n - mean_T)^2,
    whatever c is; near the mean, the last two terms are so small that they cancel no digits (with c = 0 and a waveform that
    has an offset of 50 standard deviations four digits went).

    Args:
        x: [B, C, T]
        num_valid: valid frames per row, [B], each >= 1.
        weight, bias: [C]
    Returns:
        [B, C, T] in the type of ``x``; invalid frames hold finite values that nothing reads.
    """
    total = x.shape[-1]
    valid = torch.arange(total, device=x.device) < num_valid[:, None]  # [B, T]
    values = x.float()
    n = num_valid.to(torch.float32)[:, None]  # [B, 1]
    # [B, C, T] @ [B, T, 1] -> [B, C]; detached, since the result does not depend on c
    with kernels.without_autocast(x.device):
        centre = (values.detach() @ valid.to(values.dtype).unsqueeze(-1)).squeeze(-1) / n
    values = torch.where(valid[:, None, :], values, centre.unsqueeze(-1))
    var_t, mean_t = torch.var_mean(values, dim=-1, correction=0)  # [B, C]
    drift = mean_t - centre
    mean = centre + drift * (total / n)
    squares = total * var_t - (total - n) * drift.square() - n * (mean - mean_t).square()
    scale = weight.float() * torch.rsqrt((squares / n).clamp_min(0) + eps)  # [B, C]
    shift = bias.float() - mean * scale
    return torch.addcmul(shift.unsqueeze(-1), values, scale.unsqueeze(-1)).to(x.dtype)


class SeparableConv(nn.Sequential):
    """A convolution in two: over time within each channel, then over channels  (Howard et al., 2017, section 3.1).

    Nothing stands between them, so that only the second has a bias. Keys: ``0`` is the depthwise conv, weight [C_in, 1, K],
    ``1`` the pointwise one, weight [C, C_in, 1].
    """

    def __init__(self, in_channels: int, shape: ConvLayerConfig, bias: bool) -> None:
        depthwise = nn.Conv1d(
            in_channels, in_channels, shape.kernel, stride=shape.stride, groups=in_channels, bias=False
        )
        pointwise = nn.Conv1d(in_channels, shape.channels, 1, bias=bias)
        nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")  # the GELU is behind the second
        nn.init.kaiming_normal_(pointwise.weight)
        super().__init__(depthwise, pointwise)


def gated_conv(conv: nn.Module, x: Tensor, gate: Tensor | None, activate: bool = False) -> Tensor:
    """conv(z * x; W) = conv(x; z * W) of x [B, C_in, T] and z [C_in]: a layer has fewer weights than input values.

    So the first layers keep no scaled copies of their output, which are the largest tensors of a training step. ``activate``:
    of GELU(x) in place of x, which is not kept either, see `gelu_conv`.
    """
    if isinstance(conv, nn.Conv1d) and products.is_plain(conv, nn.Conv1d) and conv.groups == 1:
        if activate:
            return gelu_conv(x, gate, conv)
        if gate is None:
            return conv(x)
        return conv._conv_forward(x, conv.weight * gate.to(conv.weight.dtype)[:, None], conv.bias)
    # has weights of its own kind, or somebody watches it
    x = gelu_over_rows(x) if activate else x
    return conv(x if gate is None else x * gate.to(x.dtype)[:, None])  # type: ignore[no-any-return]


class ConvLayer(nn.Sequential):
    """conv -> (norm) -> GELU, under fairseq's keys: ``0`` is the conv, ``2`` the GroupNorm, ``2.1`` the LayerNorm."""

    def __init__(self, in_channels: int, shape: ConvLayerConfig, bias: bool, norm: str) -> None:
        conv: nn.Module
        if shape.separable:
            conv = SeparableConv(in_channels, shape, bias)
        else:
            conv = nn.Conv1d(in_channels, shape.channels, shape.kernel, stride=shape.stride, bias=bias)
            nn.init.kaiming_normal_(conv.weight)
        self.norm, self.shape = norm, shape
        modules: list[nn.Module] = [conv]
        if norm == "group_norm":
            modules += [nn.Identity(), nn.GroupNorm(shape.channels, shape.channels)]
        elif norm == "layer_norm":
            modules += [nn.Identity(), nn.Sequential(nn.Identity(), LayerNorm(shape.channels))]
        super().__init__(*modules)

    @property
    def conv(self) -> nn.Module:
        return self[0]

    @property
    def norm_layer(self) -> nn.GroupNorm | LayerNorm | None:
        if self.norm == "none":
            return None
        return self[2] if self.norm == "group_norm" else self[2][1]  # type: ignore[index, return-value]

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:  # type: ignore[override]
        """x [B, C_in, T_in] -> [B, C, T]; arguments as of `convolve`."""
        return F.gelu(self.convolve(x, *arguments, **options))

    def convolve(
        self,
        x: Tensor,
        num_valid: Tensor | None = None,
        gate: Tensor | None = None,
        input_gate: Tensor | None = None,
        activate: bool = False,
    ) -> Tensor:
        """x [B, C_in, T_in] -> [B, C, T] in front of the GELU, which whoever calls has to apply.

        Args:
            num_valid: valid output frames, [B]; None = all.
            gate: weights the LayerNorm's statistics, [C]; it does not scale the output.
            input_gate: scales the input's channels, [C_in], see `gated_conv`.
            activate: the input still needs the GELU of the layer before.
        """
        norm = self.norm_layer
        if (
            isinstance(norm, nn.GroupNorm)
            and products.is_plain(self.conv, nn.Conv1d)
            and products.is_plain(norm, nn.GroupNorm)
        ):
            assert isinstance(self.conv, nn.Conv1d)
            if x.shape[1] == 1 and not x.requires_grad and input_gate is None and products.is_eager_on_cpu(x):
                return conv_group_norm(x, self.conv, norm, num_valid)
        x = gated_conv(self.conv, x, input_gate, activate)
        if isinstance(norm, nn.GroupNorm):
            if num_valid is None:
                x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
            else:
                x = masked_group_norm(x, num_valid, norm.weight, norm.bias, norm.eps)
        elif norm is not None:
            x = norm(x.transpose(1, 2), gate).transpose(1, 2)
        return x


class ConvExtractor(nn.Module):
    """The stack of `ConvLayer`s; keys ``conv_layers.N.0.weight`` and so on, as in fairseq."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.over_padding = config.group_norm_over_padding
        self.conv_layers = nn.ModuleList()
        in_channels = 1
        for i, shape in enumerate(config.conv_layers):
            default = "group_norm" if i == 0 else "none"
            norm = "layer_norm" if config.extractor_mode == "layer_norm" else default
            self.conv_layers.append(ConvLayer(in_channels, shape, config.conv_bias, norm))
            in_channels = shape.channels

    def forward(
        self, source: Tensor, lengths: Tensor | None = None, gates: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Waveforms to features.

        Args:
            source: [B, S], 16 kHz.
            lengths: valid samples per row, [B], or None when nothing is padded.
            gates: per conv layer [C] or None. The last layer's gate is NOT applied here: a LayerNorm follows, which
                must see the ungated values (the caller weights its statistics and gates its output).
        Returns:
            [B, C, T]
        """
        x = source.unsqueeze(1)  # [B, S] -> [B, 1, S]
        input_gate = None
        for i, layer in enumerate(self.conv_layers):
            shape: ConvLayerConfig = layer.shape  # type: ignore[assignment]
            num_valid = None
            if lengths is not None:
                lengths = (lengths - shape.kernel) // shape.stride + 1
                num_valid = None if self.over_padding else lengths
            gate = gates[i] if gates is not None else None
            x = layer.convolve(x, num_valid, gate, input_gate, activate=i > 0)  # type: ignore[operator]
            input_gate = gate
        return F.gelu(x)
