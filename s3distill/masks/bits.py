"""Boolean masks as bits: an eighth of a byte per connection, the form in which the mask bank holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def packed_size(num_values: int) -> int:
    """Bytes that hold ``num_values`` bits, ceil(N / 8)."""
    return -(-num_values // 8)


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a mask, row by row; the first value is the highest bit of the first byte, the last byte is filled up with zeros.

    Args:
        mask: bool, any shape with N values.
    Returns:
        uint8 [ceil(N / 8)], on the CPU.
    Raises:
        ValueError: ``mask`` is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be bool, but is {mask.dtype}; compare the scores with their threshold first")
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 [ceil(N / 8)], N the number of values of ``shape``.
    Returns:
        bool, ``shape``, on the CPU.
    Raises:
        ValueError: ``packed`` is not of that type and length.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count),):
        raise ValueError(
            f"a mask of shape {tuple(shape)} must be packed into {packed_size(count)} bytes, but there are {tuple(packed.shape)} of type "
            f"{packed.dtype}"
        )
    bits = np.unpackbits(packed.detach().cpu().numpy(), count=count)
    return torch.from_numpy(bits).view(torch.bool).reshape(tuple(shape))
