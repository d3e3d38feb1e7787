"""Confidence by hand: posteriors are chosen, thresholds and means follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from s3distill.losses import RelativeThreshold, confident_frames, utterance_confidence

BLANK = 0
# [B, T, V]: the last frame of row 1 is padding
POSTERIORS = [
    [[0.95, 0.03, 0.02], [0.05, 0.92, 0.03], [0.20, 0.20, 0.60]],
    [[0.10, 0.10, 0.80], [0.89, 0.01, 0.10], [0.01, 0.98, 0.01]],
]
PADDING = torch.tensor([[False, False, False], [False, False, True]])


def logits(posteriors: object = POSTERIORS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Not normalised: an offset per frame does not count."""
    p = torch.tensor(posteriors, dtype=torch.float64).log()
    return (p + torch.arange(p.shape[1])[:, None]).to(dtype)


def test_frames_that_reach_the_threshold() -> None:
    assert confident_frames(logits(), PADDING, 0.9).tolist() == [[True, True, False], [False, False, False]]
    assert confident_frames(logits(), None, 0.9).tolist() == [[True, True, False], [False, False, True]]
    assert confident_frames(logits(), PADDING, 0.0).tolist() == (~PADDING).tolist()
    assert confident_frames(logits(), PADDING, 0.79).tolist() == [[True, True, False], [True, True, False]]


def test_utterances() -> None:
    """Row 0: frames 1 and 2 are symbols; row 1: frame 0."""
    assert utterance_confidence(logits(), PADDING, BLANK).tolist() == pytest.approx([0.76, 0.8])
    assert utterance_confidence(logits(), None, BLANK).tolist() == pytest.approx([0.76, 0.89])
    assert utterance_confidence(logits(), PADDING, blank=2).tolist() == pytest.approx([0.935, 0.89])
    only_blanks = logits([[[0.9, 0.05, 0.05]] * 3])
    assert utterance_confidence(only_blanks, None, BLANK).tolist() == [0.0]


@pytest.mark.parametrize("rubbish", [-math.inf, math.nan])
def test_padding_is_not_read(rubbish: float) -> None:
    spoiled = logits()
    spoiled[PADDING] = rubbish
    assert torch.equal(confident_frames(spoiled, PADDING, 0.9), confident_frames(logits(), PADDING, 0.9))
    assert torch.equal(utterance_confidence(spoiled, PADDING, BLANK), utterance_confidence(logits(), PADDING, BLANK))
    alone = torch.cat(
        [utterance_confidence(logits()[:1], None, BLANK), utterance_confidence(logits()[1:, :2], None, 0)]
    )
    torch.testing.assert_close(utterance_confidence(spoiled, PADDING, BLANK), alone)


def test_half_precision() -> None:
    got = utterance_confidence(logits(dtype=torch.bfloat16), PADDING, BLANK)
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx([0.76, 0.8], abs=0.01)


def test_the_relative_threshold_follows_labelled_data() -> None:
    threshold = RelativeThreshold(tau=0.9, decay=0.75)
    assert threshold.value == math.inf and not confident_frames(logits(), None, threshold.value).any()
    # spoken frames: 0.92, 0.60, 0.80; the blank frames of 0.95 and 0.89 are left out
    threshold.update(threshold.sums(logits(), PADDING, BLANK))
    first = (0.92 + 0.60 + 0.80) / 3
    assert threshold.value.item() == pytest.approx(0.9 * first)
    threshold.update(threshold.sums(logits([[[0.0625, 0.875, 0.0625]]]), None, BLANK))
    second = 0.75 * first + 0.25 * 0.875
    assert threshold.value.item() == pytest.approx(0.9 * second)
    assert confident_frames(logits(), PADDING, threshold.value).tolist() == [[True, True, False], [True, True, False]]


def test_without_spoken_frames_the_average_stays() -> None:
    threshold = RelativeThreshold()
    threshold.update(threshold.sums(logits(), PADDING, BLANK))
    before = threshold.value
    threshold.update(threshold.sums(logits([[[0.9, 0.05, 0.05]]]), None, BLANK))
    assert torch.equal(threshold.value, before) and threshold.num_updates == 1


def test_ranks_add_up() -> None:
    together, apart = RelativeThreshold(), RelativeThreshold()
    together.update(together.sums(logits(), PADDING, BLANK))
    apart.update(
        apart.sums(logits()[:1], PADDING[:1], BLANK) + apart.sums(logits()[1:], PADDING[1:], BLANK) + torch.zeros(2)
    )
    torch.testing.assert_close(together.value, apart.value)


def test_the_state_is_in_checkpoints_and_stays_float32() -> None:
    threshold, loaded = nn.Sequential(RelativeThreshold()), nn.Sequential(RelativeThreshold())
    threshold.half()
    threshold[0].update(threshold[0].sums(logits(), PADDING, BLANK))
    loaded.load_state_dict(threshold.state_dict())
    assert loaded[0].value.item() == threshold[0].value.item() == pytest.approx(0.9 * 2.32 / 3, rel=1e-6)
    assert set(threshold.state_dict()) == {"0.mean", "0.num_updates"}


def test_faults() -> None:
    with pytest.raises(ValueError, match=r"`threshold` .* in \[0, 1\], but is 90; 0.9 is usual"):
        confident_frames(logits(), PADDING, 90)
    with pytest.raises(ValueError, match=r"`tau` .* in \(0, 1\], but is 0"):
        RelativeThreshold(tau=0)
    with pytest.raises(ValueError, match=r"`decay` .* in \[0, 1\), but is 1"):
        RelativeThreshold(decay=1)
    with pytest.raises(ValueError, match="`blank` must be one of the 3 symbols, but is 3"):
        utterance_confidence(logits(), PADDING, 3)
    with pytest.raises(ValueError, match=r"`logits` must be \[B, T, V\], but has shape \(3, 3\)"):
        utterance_confidence(logits()[0], None, BLANK)
    with pytest.raises(ValueError, match=r"`padding_mask` must be \[B, T\] = \(2, 3\).* but is \(2, 2\)"):
        confident_frames(logits(), PADDING[:, :2], 0.9)
