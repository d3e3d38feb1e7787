"""The size constraint: two multipliers that rise while the expected sparsity is off its target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s3distill.gates.float32 import Float32Module


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def reverse_gradient(x: Tensor) -> Tensor:
    """The identity with a gradient of the opposite sign  (Ganin & Lempitsky, 2015, section 3).

    What minimises the result ascends in ``x``.
    """
    return _ReverseGradient.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def target_at(step: int, target: float, warmup: int, start: float = 0.0) -> float:
    """Target sparsity at an update: linear from ``start`` at ``step`` 0 to ``target`` at ``step`` = ``warmup``, then constant.

    Args:
        step: updates done.
        target: final sparsity, in [0, 1).
        warmup: updates; 0 = no warm-up.
        start: sparsity with every gate open; above 0 for a student that is smaller than what sparsity refers to.
    """
    if step < 0 or warmup < 0:
        raise ValueError(f"`step` and `warmup` count updates and must be at least 0, but are {step} and {warmup}")
    return target if step >= warmup else start + (target - start) * step / warmup


class Lagrangian(Float32Module):
    """Augmented Lagrangian of the size constraint  (Wang et al., 2020, "Structured Pruning of Large Language Models").

        penalty = lambda1 * (s - t) + lambda2 * (s - t)^2,    min over the model, max over lambda1, lambda2

    Both multipliers start at 0. The gradient that reaches them is reversed, so that the optimizer that minimises the
    loss ascends in them: lambda1 follows the sign of the error, lambda2 only grows. They stay float32; give them no
    weight decay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.lambda2 = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """The penalty, [] float32.

        It is no sum over frames: where gradients are divided by a sample size, multiply it by that size.

        Args:
            sparsity: expected sparsity s, [], differentiable.
            target: t of this update, see `target_at`.
        """
        error = (sparsity - target).float()  # subtracted in the type of `sparsity` (float64) first
        return reverse_gradient(self.lambda1) * error + reverse_gradient(self.lambda2) * error.square()
