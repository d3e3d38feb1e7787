"""The precision that losses are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32, which holds their squares and sums; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
