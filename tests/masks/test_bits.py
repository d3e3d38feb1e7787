"""Packing masks into bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.masks.bits import pack_bits, packed_size, unpack_bits

shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4)


@settings(deadline=None)
@given(shapes, st.integers(0, 2**32 - 1))
def test_unpacking_gives_the_mask_back(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
    unpacked = unpack_bits(packed, shape)
    assert unpacked.dtype == torch.bool and unpacked.shape == mask.shape and torch.equal(unpacked, mask)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_bits_stand_in_the_documented_order(values: list[bool]) -> None:
    """The format of a file: it must not change with numpy's defaults."""
    slow = [0] * packed_size(len(values))
    for i, value in enumerate(values):
        slow[i // 8] |= int(value) << (7 - i % 8)
    assert pack_bits(torch.tensor(values, dtype=torch.bool)).tolist() == slow


def test_a_view_is_packed_as_it_looks() -> None:
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(pack_bits(mask.T), pack_bits(mask.T.contiguous()))
    assert not torch.equal(pack_bits(mask.T), pack_bits(mask))
    assert torch.equal(pack_bits(mask[:, :1].expand(6, 10)), pack_bits(mask[:, :1].repeat(1, 10)))


def test_every_single_bit_counts() -> None:
    packed = pack_bits(torch.zeros(5, 5, dtype=torch.bool))
    for i in range(25):
        mask = torch.zeros(25, dtype=torch.bool)
        mask[i] = True
        other = pack_bits(mask.view(5, 5))
        assert not torch.equal(other, packed) and unpack_bits(other, (5, 5)).nonzero().tolist() == [[i // 5, i % 5]]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`mask` must be bool, but is torch\.float32"):
        pack_bits(torch.ones(8))
    for packed in (
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(1, 1, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int8),
    ):
        with pytest.raises(ValueError, match=r"a mask of shape \(2, 4\) must be packed into 1 bytes, but there are"):
            unpack_bits(packed, (2, 4))
