"""Mixup of waveforms: teacher and student hear the same sum of two utterances, which the teacher's output labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s3distill.encoder.speech_model import normalize_waveforms
from s3distill.losses.precision import at_least_float32


def draw_mixup_coefficients(alpha: float, seeds: Sequence[Sequence[int]]) -> Tensor:
    """a ~ Beta(alpha, alpha), then max(a, 1 - a)  (Zhang et al., 2018, mixup; the larger share names the utterance).

    A batch of one has no partner: its coefficient is 1, so that ``coefficients < 1`` says what is mixed.

    Args:
        alpha: concentration, above 0; 1 is uniform, below 1 most mixes are nearly pure.
        seeds: what decides each coefficient, e.g. (seed, update, utterance) per row: a resumed run repeats them.
    Returns:
        [B] float32 in [0.5, 1], on the CPU.
    Raises:
        ValueError: ``alpha`` is not above 0.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"mixup's `alpha` of Beta(alpha, alpha) must be above 0, but is {alpha}; pass 1 for uniform shares, or switch mixup off"
        )
    if len(seeds) == 1:
        return torch.ones(1)
    drawn = [float(np.random.default_rng(list(seed)).beta(alpha, alpha)) for seed in seeds]
    return torch.tensor([max(a, 1 - a) for a in drawn], dtype=torch.float32)


def mix_waveforms(
    source: Tensor, padding_mask: Tensor | None, coefficients: Tensor, normalize: bool
) -> tuple[Tensor, Tensor | None]:
    """Waveform mixup of function matching  (Beyer et al., 2022, "Knowledge distillation: A good teacher is patient").

        m_i = a_i x_i + (1 - a_i) x_j,    j = i - 1 (the batch rolled by one),    m_i normalised again where x_i was

    The mix has the length of x_i: what x_j has beyond it is cut off, and where x_j is shorter it adds silence. So the
    frames of a mixed utterance are those of x_i, and ``padding_mask`` and masks over frames stay what they are. A row with
    a_i = 1 comes back bit for bit; padded samples too.

    Args:
        source: x, [B, S], 16 kHz.
        padding_mask: [B, S] bool, True = padding, or None.
        coefficients: a, [B], each in [0.5, 1]; see `draw_mixup_coefficients`.
        normalize: zero mean and unit variance over the valid samples of each mix: the task's ``normalize``.
    Returns:
        m, [B, S] of ``source``'s type, and ``padding_mask``.
    Raises:
        ValueError: shapes do not fit, or a coefficient is outside [0.5, 1].
    """
    _check(source, padding_mask, coefficients)
    # sums of squares over seconds of audio overflow in half precision
    audible = at_least_float32(source if padding_mask is None else source.masked_fill(padding_mask, 0))
    share = coefficients.to(audible)[:, None]  # [B, 1]
    mixed = share * audible + (1 - share) * audible.roll(1, dims=0)
    if normalize:
        mixed = normalize_waveforms(mixed, padding_mask)
    kept = share == 1
    if padding_mask is not None:
        kept = kept | padding_mask
    return torch.where(kept, source, mixed.to(source.dtype)), padding_mask


def _check(source: Tensor, padding_mask: Tensor | None, coefficients: Tensor) -> None:
    if source.dim() != 2 or coefficients.shape != source.shape[:1]:
        raise ValueError(
            f"`source` must be [B, S] and `coefficients` [B], but are {tuple(source.shape)} and {tuple(coefficients.shape)}; draw one "
            "coefficient per utterance"
        )
    if padding_mask is not None and padding_mask.shape != source.shape:
        raise ValueError(
            f"`padding_mask` must be [B, S] = {tuple(source.shape)}, one value per sample, but is {tuple(padding_mask.shape)}; pass the "
            "mask that came with the audio, not the one over frames"
        )
    if coefficients.numel() and not (coefficients.min() >= 0.5 and coefficients.max() <= 1):
        raise ValueError(
            f"`coefficients` must be in [0.5, 1], so that an utterance stays the larger part of its mix, but are from "
            f"{coefficients.min().item():g} to {coefficients.max().item():g}; take max(a, 1 - a)"
        )
