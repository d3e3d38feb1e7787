"""Which frames and utterances of a teacher to learn from: those that it is sure of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s3distill.gates.float32 import Float32Module
from s3distill.losses.precision import at_least_float32


def confident_frames(logits: Tensor, padding_mask: Tensor | None, threshold: float | Tensor) -> Tensor:
    """Frames whose most likely symbol reaches a threshold, max_v p_t(v) >= c  (Sohn et al., 2020, FixMatch, eq. 4).

    The blank counts as a symbol here: a frame in which the teacher is sure of silence is one to learn from.

    Args:
        logits: of the teacher, or its log-probabilities, [B, T, V], any floating type.
        padding_mask: [B, T] bool, True = padding, or None; padded frames may hold anything.
        threshold: c, in [0, 1], or what `RelativeThreshold.value` gives.
    Returns:
        [B, T] bool, True = confident; never a padded frame.
    Raises:
        ValueError: a shape does not fit, or ``threshold`` is a number outside [0, 1].
    """
    if not isinstance(threshold, Tensor):
        check_threshold(threshold)
    top, _, valid = _top_posteriors(logits, padding_mask)
    return valid & (top >= threshold)


def utterance_confidence(logits: Tensor, padding_mask: Tensor | None, blank: int) -> Tensor:
    """Mean posterior of the frames that are read as a symbol, mean over {t: argmax_v p_t(v) != blank} of max_v p_t(v).

    Blank frames are most of what a CTC model gives and nearly always sure; with them every utterance looks good.

    Args:
        logits, padding_mask: as of `confident_frames`.
        blank: index of the blank symbol.
    Returns:
        [B] float32 in [0, 1]; 0 where no frame is read as a symbol: there is nothing to learn from.
    Raises:
        ValueError: a shape does not fit, or ``blank`` is no symbol.
    """
    sums, counts = _spoken_sums(logits, padding_mask, blank)
    return torch.where(counts > 0, sums / counts.clamp_min(1), 0.0)


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raises `ValueError` for a threshold of posteriors that is outside [0, 1]."""
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"`{name}` is compared with posteriors and must be in [0, 1], but is {threshold}; 0.9 is usual"
        )


class RelativeThreshold(Float32Module):
    """The threshold of AdaMatch, which follows how sure the model is of labelled data  (Berthelot et al., 2022, AdaMatch).

        c = tau * m,    m <- decay * m + (1 - decay) * mean over labelled frames of max_v p_t(v)

    Chosen here: AdaMatch takes the mean of each batch alone, a batch of a few utterances asks for the moving average; frames
    whose most likely symbol is the blank are left out, which would pull m to 1. The first batch sets m. The state (``mean``,
    ``num_updates``) goes into checkpoints and stays float32.

        sums = threshold.sums(logits, padding_mask, blank)   # on every rank, labelled or not; add them up over ranks
        threshold.update(sums)
        confident_frames(teacher_logits, mask, threshold.value)

    Args:
        tau: share of the labelled confidence that is asked for, in (0, 1].
        decay: of the moving average, in [0, 1).
    Raises:
        ValueError: either is out of range.
    """

    mean: Tensor
    num_updates: Tensor

    def __init__(self, tau: float = 0.9, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 < tau <= 1:
            raise ValueError(
                f"`tau` is a share of the confidence on labelled data and must be in (0, 1], but is {tau}; AdaMatch takes 0.9"
            )
        if not 0 <= decay < 1:
            raise ValueError(
                f"`decay` of the moving average must be in [0, 1), but is {decay}; 0.99 averages 100 batches"
            )
        self.tau, self.decay = tau, decay
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def sums(logits: Tensor, padding_mask: Tensor | None, blank: int) -> Tensor:
        """What a batch of labelled data adds: [2] float32, the sum of max_v p_t(v) over spoken frames and their number.

        Sums, so that those of ranks, and of batches without labels (zeros), can be added before `update`.
        """
        sums, counts = _spoken_sums(logits, padding_mask, blank)
        return torch.stack([sums.sum(), counts.sum().to(sums.dtype)])

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Moves the average by the sums of one update; without a spoken frame it stays."""
        total, count = sums.to(self.mean.device).float()
        if count == 0:
            return
        decay = self.decay if self.num_updates > 0 else 0.0
        self.mean.copy_(decay * self.mean + (1 - decay) * total / count)
        self.num_updates += 1

    @property
    def value(self) -> Tensor:
        """c, [] float32; infinite before the first labelled frame, so that nothing is confident."""
        return torch.where(self.num_updates > 0, self.tau * self.mean, math.inf)


def _spoken_sums(logits: Tensor, padding_mask: Tensor | None, blank: int) -> tuple[Tensor, Tensor]:
    """Sum of the top posteriors over frames that are not read as blank, and their number, [B] each."""
    if not 0 <= blank < logits.shape[-1]:
        raise ValueError(f"`blank` must be one of the {logits.shape[-1]} symbols, but is {blank}")
    top, best, valid = _top_posteriors(logits, padding_mask)
    spoken = valid & (best != blank)
    return (top * spoken).sum(-1), spoken.sum(-1)


@torch.no_grad()
def _top_posteriors(logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest posterior, its symbol, and whether the frame is valid, [B, T] each; padded frames count as uniform."""
    if logits.dim() != 3:
        raise ValueError(f"`logits` must be [B, T, V], but has shape {tuple(logits.shape)}")
    valid = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if padding_mask is not None:
        if padding_mask.shape != logits.shape[:2]:
            raise ValueError(
                f"`padding_mask` must be [B, T] = {tuple(logits.shape[:2])}, one value per frame, but is {tuple(padding_mask.shape)}; a "
                "mask over samples must be reduced to frames first"
            )
        valid = ~padding_mask
    # fairseq writes -inf into padded frames, whose softmax is NaN
    top, best = at_least_float32(logits).masked_fill(~valid[:, :, None], 0).softmax(-1).max(-1)
    return top, best, valid
