"""Parameters that stay float32 when the model around them is cast: gate locations and multipliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose float32 parameters follow ``.to(device)`` but no change of type.

    `nn.Module.half`, ``bfloat16``, ``double`` and ``to(dtype)`` all go through `_apply`. In half precision a gate would
    be lost: near log_alpha = 4 the spacing of bfloat16 is 0.03, more than one update.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dtype != torch.float32 or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)  # not result.float(): that would keep the rounding

        apply: Any = super()._apply
        return apply(move_only, recurse)  # type: ignore[no-any-return]
