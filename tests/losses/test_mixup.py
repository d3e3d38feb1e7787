"""Waveform mixup: identity at a = 1, sums by hand, padded = alone, and coefficients that a resumed run repeats."""

from __future__ import annotations

import pytest
import torch

from s3distill.encoder.speech_model import normalize_waveforms
from s3distill.losses import draw_mixup_coefficients, mix_waveforms

LENGTHS = [9, 5, 7]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    padding_mask = torch.arange(9) >= torch.tensor(LENGTHS)[:, None]
    noise = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    return noise.masked_fill(padding_mask, 0), padding_mask


def test_by_hand() -> None:
    source = torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, 0.0]])
    padding_mask = torch.tensor([[False, False, False], [False, False, True]])
    mixed, mask = mix_waveforms(source, padding_mask, torch.tensor([0.75, 0.5]), normalize=False)
    # row 0 hears row 1, which ends before it; row 1 hears the part of row 0 that fits
    assert mixed.tolist() == [[1.75, 3.0, 2.25], [2.5, 4.0, 0.0]]
    assert mask is padding_mask


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_share_of_one_is_the_identity_bit_for_bit(batch: tuple, normalize: bool, dtype: torch.dtype) -> None:
    source, padding_mask = batch[0].to(dtype), batch[1]
    source[padding_mask] = 7.0  # padding may hold anything
    for coefficients in (torch.ones(3), torch.tensor([1.0, 0.6, 1.0])):
        mixed, _ = mix_waveforms(source, padding_mask, coefficients, normalize)
        assert torch.equal(mixed[[0, 2]], source[[0, 2]]) and mixed.dtype == dtype
        assert torch.equal(mixed[1], source[1]) == (coefficients[1] == 1).item()
    assert torch.equal(mix_waveforms(source, None, torch.ones(3), normalize)[0], source)


def test_normalised_over_valid_samples(batch: tuple) -> None:
    source, padding_mask = batch
    mixed, _ = mix_waveforms(source, padding_mask, torch.full((3,), 0.7), normalize=True)
    for row, length in zip(mixed, LENGTHS, strict=True):
        assert row[:length].mean().item() == pytest.approx(0, abs=1e-6)
        assert row[:length].var(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert not row[length:].any()
    plain, _ = mix_waveforms(source, padding_mask, torch.full((3,), 0.7), normalize=False)
    torch.testing.assert_close(mixed, normalize_waveforms(plain, padding_mask))


@pytest.mark.parametrize("normalize", [False, True])
def test_padding_is_not_heard(batch: tuple, normalize: bool) -> None:
    """More padding, and rubbish in it, change nothing."""
    source, padding_mask = batch
    coefficients = torch.tensor([0.6, 0.8, 0.5])
    expected, _ = mix_waveforms(source, padding_mask, coefficients, normalize)
    longer = torch.nn.functional.pad(source, (0, 4), value=float("nan"))
    longer_mask = torch.nn.functional.pad(padding_mask, (0, 4), value=True)
    longer[longer_mask] = float("nan")
    mixed, _ = mix_waveforms(longer, longer_mask, coefficients, normalize)
    for row, other, length in zip(mixed, expected, LENGTHS, strict=True):
        torch.testing.assert_close(row[:length], other[:length])


def test_long_audio_in_half_precision_is_normalised() -> None:
    source = 2 * torch.randn(2, 60000, generator=torch.Generator().manual_seed(1)).half()
    mixed, _ = mix_waveforms(source, None, torch.full((2,), 0.5), normalize=True)
    assert mixed.float().std(dim=1).tolist() == pytest.approx([1, 1], abs=1e-2)


def test_coefficients_depend_on_their_seed_alone() -> None:
    drawn = draw_mixup_coefficients(0.4, [(1, 7, u) for u in range(50)])
    again = draw_mixup_coefficients(0.4, [(1, 7, u) for u in range(49, -1, -1)])
    assert torch.equal(drawn, again.flip(0)) and drawn.dtype == torch.float32
    assert drawn.min() >= 0.5 and drawn.max() <= 1 and len(drawn.unique()) == 50
    assert not torch.equal(drawn, draw_mixup_coefficients(0.4, [(1, 8, u) for u in range(50)]))


def test_coefficients_follow_the_distribution() -> None:
    """E max(a, 1 - a) of a ~ Beta(1, 1) is 3/4; the closer alpha is to 0, the closer to 1."""
    seeds = [(u,) for u in range(4000)]
    assert draw_mixup_coefficients(1.0, seeds).mean().item() == pytest.approx(0.75, abs=0.01)
    assert draw_mixup_coefficients(0.05, seeds).mean().item() > 0.93
    assert draw_mixup_coefficients(50.0, seeds).mean().item() < 0.55


def test_a_batch_of_one_is_not_mixed() -> None:
    assert draw_mixup_coefficients(1.0, [(1, 2, 3)]).tolist() == [1.0]


def test_faults(batch: tuple) -> None:
    source, padding_mask = batch
    half = torch.full((3,), 0.5)
    with pytest.raises(ValueError, match=r"`alpha` of Beta\(alpha, alpha\) must be above 0, but is 0"):
        draw_mixup_coefficients(0, [(1,), (2,)])
    with pytest.raises(ValueError, match=r"`coefficients` \[B\], but are \(3, 9\) and \(2,\)"):
        mix_waveforms(source, padding_mask, half[:2], False)
    with pytest.raises(ValueError, match=r"`padding_mask` must be \[B, S\] = \(3, 9\).* but is \(3, 4\)"):
        mix_waveforms(source, padding_mask[:, :4], half, False)
    with pytest.raises(ValueError, match=r"must be in \[0.5, 1\].* from 0.3 to 0.5; take max"):
        mix_waveforms(source, padding_mask, torch.tensor([0.5, 0.3, 0.5]), False)
    with pytest.raises(ValueError, match=r"must be in \[0.5, 1\]"):
        mix_waveforms(source, padding_mask, torch.tensor([0.5, float("nan"), 0.5]), False)
