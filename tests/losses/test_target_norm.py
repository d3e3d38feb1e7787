"""Normalised targets: moments, slow loops, padding, the range of half precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.losses import TARGET_NORMS, normalize_target


def states(lengths: list[int], channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(len(lengths), max(lengths), channels, generator=generator, dtype=torch.float64)
    return 3 * h + 2, torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 1000))
def test_it_is_the_loop(lengths: list[int], channels: int, seed: int) -> None:
    h, padding_mask = states(lengths, channels, seed)
    instance, layer = (normalize_target(h, padding_mask, kind) for kind in ("instance", "layer"))
    for row, length in enumerate(lengths):
        for t in range(length):
            for c in range(channels):
                for got, values in ((instance, h[row, :length, c]), (layer, h[row, t])):
                    mean = sum(values.tolist()) / len(values)
                    variance = sum((v - mean) ** 2 for v in values.tolist()) / len(values)
                    expected = (h[row, t, c].item() - mean) / math.sqrt(variance + 1e-5)
                    assert got[row, t, c].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_they_are_torchs_own_norms_without_padding() -> None:
    h, _ = states([7, 7], 5)
    torch.testing.assert_close(normalize_target(h, None, "instance"), F.instance_norm(h.mT).mT)
    torch.testing.assert_close(normalize_target(h, None, "layer"), F.layer_norm(h, (5,)))
    assert normalize_target(h, None, "none") is h


@pytest.mark.parametrize("kind", TARGET_NORMS)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padding_changes_nothing(kind: str, garbage: float) -> None:
    h, padding_mask = states([6, 2, 5], 4)
    singles = [normalize_target(h[i : i + 1, :n], None, kind) for i, n in enumerate([6, 2, 5])]
    h[padding_mask] = garbage
    batch = normalize_target(h, padding_mask, kind)
    for i, single in enumerate(singles):
        torch.testing.assert_close(batch[i : i + 1, : single.shape[1]], single)


def test_scale_and_offset_of_the_teacher_are_gone() -> None:
    h, padding_mask = states([8, 5], 6)
    scales = 10 ** torch.linspace(0, 4, 6, dtype=torch.float64)
    moved = scales * h + 1000
    torch.testing.assert_close(
        normalize_target(moved, padding_mask, "instance"),
        normalize_target(h, padding_mask, "instance"),
        rtol=0,
        atol=1e-4,
    )
    assert (normalize_target(moved, padding_mask, "layer")[~padding_mask].mean(-1).abs() < 1e-9).all()


@pytest.mark.parametrize("kind", ["instance", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [6e4, 1.0, 6e-8])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype, size: float) -> None:
    h, padding_mask = states([40, 9], 32)
    h = (size * h / h.abs().max()).to(dtype)
    got = normalize_target(h, padding_mask, kind)
    assert got.dtype == torch.float32 and got.isfinite().all() and got.abs().max() < 40
    expected = normalize_target(h.double(), padding_mask, kind).float()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_frame_and_no_frame_are_finite() -> None:
    h, _ = states([3, 3], 4)
    padding_mask = torch.tensor([[False, True, True], [True, True, True]])
    assert (normalize_target(h, padding_mask, "instance") == 0).all()


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="`target_norm` must be one of none, instance, layer, but is 'batch'"):
        normalize_target(torch.zeros(1, 2, 3), None, "batch")
