"""Gradients of something that weighs every output differently, for comparing two ways of computing one thing."""

from __future__ import annotations

import torch
from torch import Tensor


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of the weighted sum of ``output``, weights from -1 to 1, for each of ``inputs``."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), inputs))
