"""A grouped convolution whose groups have different numbers of channels: what pruning leaves of the positional convolution.

Each group is a dense convolution of its own. Padding all groups to the largest would let torch run one grouped convolution,
but costs what the padding costs: groups of 48 channels of which every second one stays, at random, have 24 on average and 30
in the largest, which is 1.6 times the multiplications.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RaggedConv(nn.Module):
    """Conv1d of stride 1 that keeps the length; group g maps ``inputs[g]`` channels to ``outputs[g]``.

    Parameters: the weights of all groups below one another, [N, 1, K] with N = sum_g outputs[g] * inputs[g], and ``bias``
    [sum_g outputs[g]]. With ``weight_norm`` they are ``weight_v`` and ``weight_g`` [1, 1, K], normed per kernel position over
    all groups as in `WeightNormConv`; else ``weight``.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], kernel: int, weight_norm: bool) -> None:
        super().__init__()
        self.inputs, self.outputs, self.kernel, self.weight_norm = inputs, outputs, kernel, weight_norm
        rows = sum(o * i for o, i in zip(outputs, inputs, strict=True))
        weight = torch.empty(rows, 1, kernel)
        nn.init.normal_(weight, std=math.sqrt(4.0 / (kernel * max(1, sum(inputs)))))
        self.bias = nn.Parameter(torch.zeros(sum(outputs)))
        if weight_norm:
            self.weight_g = nn.Parameter(weight.norm(dim=(0, 1), keepdim=True))
            self.weight_v = nn.Parameter(weight)
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, sum(inputs), T] -> [B, sum(outputs), T]"""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 2) if self.weight_norm else self.weight
        weights = split_groups(weight, self.inputs, self.outputs)
        results = [
            F.conv1d(part, w, b, padding=self.kernel // 2)[
                :, :, : x.shape[2]
            ]  # an even kernel makes one frame too many
            for part, w, b in zip(x.split(self.inputs, 1), weights, self.bias.split(self.outputs), strict=True)
            if len(w) > 0
        ]
        return torch.cat(results, 1)


def split_groups(weight: Tensor, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[Tensor]:
    """[N, 1, K] -> per group [outputs[g], inputs[g], K]; the same memory."""
    sizes = [o * i for o, i in zip(outputs, inputs, strict=True)]
    return [part.view(o, i, weight.shape[-1]) for part, o, i in zip(weight.split(sizes), outputs, inputs, strict=True)]
