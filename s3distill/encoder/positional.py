"""The convolution that tells a Transformer's frames their relative positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill import convolutions
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.layers import normalize_open, open_share
from s3distill.encoder.pos_shape import pos_conv_outputs, stream_groups, written_channels
from s3distill.encoder.ragged_conv import RaggedConv


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
        frozen = self._buffers.get("frozen_weight")  # masked forms, which are built otherwise, have none
        if frozen is not None:
            return frozen
        return torch._weight_norm(self.weight_v, self.weight_g, 2)

    def freeze(self) -> None:
        """Computes the weight for the last time, for an encoder that will not learn."""
        self.register_buffer("frozen_weight", convolutions.grouped_weight(self.weight.detach()), persistent=False)
        for name in ("weight_g", "weight_v"):
            self.register_parameter(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]"""
        y = convolutions.grouped_conv1d(x, self.weight, self.bias, self.kernel // 2, self.groups)
        return _same_length(y, self.kernel)


def _same_length(x: Tensor, kernel: int) -> Tensor:
    """An even kernel with padding K // 2 makes one frame too many; the last one goes, as in fairseq's SamePad."""
    return x[:, :, :-1] if kernel % 2 == 0 else x


class PositionalConv(nn.ModuleList):
    """Adds relative positions: conv -> (affine-free LayerNorm, if stacked) -> GELU.

    Depth 1 is wav2vec 2.0's; a stack of ``depth`` plain convs with kernel max(3, K // depth) is data2vec's
    (Baevski et al., 2022, section 4.2). Padded frames are zeroed in front of every conv, so that padding cannot leak
    into valid frames through the stack (fairseq zeroes only in front of the first). A pruned one may read fewer channels than
    there were, write to some of the stream's only (``written``), and have groups of different sizes, see `RaggedConv`.
    """

    written: Tensor | None

    def __init__(self, config: EncoderConfig) -> None:
        channels, groups, depth = config.embed_dim, config.pos_conv_groups, config.pos_conv_depth
        kernel = config.pos_conv_kernel if depth == 1 else max(3, config.pos_conv_kernel // depth)
        if config.pos_conv_shape is not None:
            sizes = (stream_groups(config), *pos_conv_outputs(config)) if config.pos_conv_shape.written else ()
            convs: list[nn.Module] = [RaggedConv(i, o, kernel, depth == 1) for i, o in itertools.pairwise(sizes)]
        elif depth == 1:
            convs = [WeightNormConv(channels, kernel, groups)]
        else:
            convs = [nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups) for _ in range(depth)]
        super().__init__(convs if depth == 1 else (nn.Sequential(conv) for conv in convs))
        self.depth, self.channels = depth, channels
        written = written_channels(config)
        # no part of the checkpoint: the config says it
        index = torch.tensor(written) if len(written) < channels else None
        self.register_buffer("written", index, persistent=False)

    def forward(self, x: Tensor, padding_mask: Tensor | None, gates: Sequence[Tensor | None] | None = None) -> Tensor:
        """[B, T, C] (padded frames already zero) -> [B, T, C]

        ``gates``: per conv [outputs] or None. They stand in front of the GELU of a single conv; in a stack they weight the
        statistics of each LayerNorm and stand behind its GELU.
        """
        if len(self) == 0:  # all of it was pruned
            return torch.zeros_like(x)
        frames = x.shape[1]
        x = x.transpose(1, 2)  # [B, C, T]
        gates = (None,) * len(self) if gates is None else gates
        if self.depth == 1:
            x = self[0](x)
            x = F.gelu(x if gates[0] is None else x * gates[0].to(x.dtype)[:, None])
            return self._write(x.transpose(1, 2))
        for i, (block, gate) in enumerate(zip(self, gates, strict=True)):
            if i > 0 and padding_mask is not None:
                x = x.masked_fill(padding_mask[:, None, :], 0)
            x = block(x)[:, :, :frames].transpose(1, 2)  # an even kernel makes one frame too many
            if gate is None:
                x = F.gelu(F.layer_norm(x, (x.shape[2],)))
            else:
                # nothing behind the last GELU could take the gate up when closed channels are cut
                output = open_share(gate, self.training) if i == self.depth - 1 else gate
                x = F.gelu(normalize_open(x, open_share(gate, self.training))) * output.to(x.dtype)
            x = x.transpose(1, 2)
        return self._write(x.transpose(1, 2))

    def _write(self, x: Tensor) -> Tensor:
        """[B, T, outputs] -> [B, T, C], 0 where nothing is written."""
        if self.written is None:
            return x
        return x.new_zeros(*x.shape[:2], self.channels).index_copy(2, self.written, x)
