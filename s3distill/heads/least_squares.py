"""The best affine map between two sets of frames, where heads can start from."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(x: Tensor, y: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The affine map that minimises sum_n ||W x_n + b - y_n||^2 + r ||W||^2, r = ridge * N * (mean variance of x).

    Solved in float64 by the centred normal equations, W^T = (X^T X + r I)^-1 X^T Y and b = mean(y) - W mean(x). The
    ridge keeps it defined for dead channels and for fewer frames than channels; the bias is free of it.

    Args:
        x: [N, C_in]
        y: [N, C_out]
    Returns:
        W [C_out, C_in] and b [C_out], float64.
    Raises:
        ValueError: ``x`` and ``y`` have not the same number of rows, or none.
    """
    if x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise ValueError(
            f"least squares needs the same frames of both sides, at least one, but got {x.shape[0]} and {y.shape[0]}"
        )
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    # with constant x the gram is 0 and so is X^T Y; any positive diagonal then gives W = 0
    gram.diagonal().add_((ridge * gram.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny))
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, mean_y - weight @ mean_x
