"""Sequence-level distillation of CTC models: the loss of a teacher's best hypotheses, weighted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.losses.precision import at_least_float32

SEQUENCE_WEIGHTS = ("one_best", "uniform", "ranked")


@dataclass(frozen=True)
class NbestTargets:
    """Hypotheses of a batch, best first.

    Attributes:
        symbols: [B, K, N] int64; what stands behind a hypothesis' length is not looked at.
        lengths: symbols of each hypothesis, [B, K] int64.
        scores: log-probabilities, natural logarithm, [B, K]; -inf = there is no such hypothesis.
    """

    symbols: Tensor
    lengths: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        if self.symbols.dim() != 3 or not self.symbols.shape[:2] == self.lengths.shape == self.scores.shape:
            raise ValueError(
                f"`symbols` must be [B, K, N], and `lengths` and `scores` [B, K], but are {tuple(self.symbols.shape)}, "
                f"{tuple(self.lengths.shape)} and {tuple(self.scores.shape)}"
            )


class SequenceLoss(NamedTuple):
    """Sums over utterances; divide by their number for means.

    Attributes:
        total: the loss, [] float32 (float64 of such inputs), differentiable.
        one_best: the part of hypothesis 1 without its weight, CTC(y_1)/|y_1|, detached.
        num_scored: utterances with at least one hypothesis that has a weight; the others add 0.
        num_impossible: hypotheses that have too few frames.
    """

    total: Tensor
    one_best: Tensor
    num_scored: int
    num_impossible: int


def hypothesis_weights(scores: Tensor, weighting: str = "ranked", beta: float = 2.0) -> Tensor:
    """Weights of an utterance's hypotheses, which sum to 1.

        w_k = r_k p_k / sum_j r_j p_j,   p = softmax(scores)
        r_k = 1                          uniform
        r_k = exp(-beta (k - 1))         ranked
        r_k = [k = 1]                    one_best

    After K-best distillation of Whisper models (its r is normalised over k and r p is not; here the product is, so that no
    utterance counts less because its teacher hesitated).

    Args:
        scores: log-probabilities, best first, [B, K]; -inf leaves a hypothesis out, whose rank stays empty.
        weighting: ``one_best``, ``uniform`` or ``ranked``.
        beta: how fast ranks lose weight, >= 0; 0 is ``uniform``.
    Returns:
        [B, K], float32 or float64; zeros in rows without a hypothesis.
    Raises:
        ValueError: an unknown weighting, a negative ``beta``, or scores that are NaN or +inf.
    """
    if weighting not in SEQUENCE_WEIGHTS:
        raise ValueError(f"`weighting` must be one of {', '.join(SEQUENCE_WEIGHTS)}, but is {weighting!r}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"`beta` must be at least 0 and finite, but is {beta}; 2 gives rank 2 a weight of 0.135")
    scores = at_least_float32(scores)
    if bool((scores.isnan() | (scores == math.inf)).any()):
        raise ValueError("`scores` must be logarithms of probabilities, but hold NaN or +inf; check the n-best file")
    rank = torch.arange(scores.shape[1], device=scores.device)
    if weighting == "one_best":
        logits = scores.masked_fill(rank > 0, -math.inf)
    else:
        logits = scores - (beta if weighting == "ranked" else 0.0) * rank
    none = (logits == -math.inf).all(dim=1, keepdim=True)
    return logits.masked_fill(none, 0.0).softmax(dim=1).masked_fill(none, 0.0)


def nbest_ctc_loss(
    log_probs: Tensor,
    padding_mask: Tensor | None,
    targets: NbestTargets,
    blank: int,
    weighting: str = "ranked",
    beta: float = 2.0,
) -> SequenceLoss:
    """sum_b sum_k w_bk CTC(y_bk) / |y_bk|,   CTC = -log P(y | x) in nats  (Graves et al., 2006; Kim and Rush, 2016, K-best).

    A hypothesis is impossible where the student has fewer frames than CTC needs, |y| + its repeated symbols: a student of a lower
    frame rate than the teacher. It is left out before the weights are made, so that the others share its weight; an utterance
    without a possible hypothesis adds 0, as fairseq's ``zero_infinity`` has it. An empty hypothesis, all blank, counts as of length 1.

    Args:
        log_probs: log-probabilities of the student, [B, T, V].
        padding_mask: [B, T], True = padding, at the end of rows; or None. What stands in padded frames is not looked at.
        targets: the teacher's hypotheses.
        blank: index of the blank symbol.
        weighting, beta: see `hypothesis_weights`.
    Raises:
        ValueError: shapes do not fit, padding within a row, a target that is blank or no symbol, or see `hypothesis_weights`.
    """
    num_frames = _frames(log_probs, padding_mask)
    _check_targets(targets, log_probs, blank)
    if padding_mask is not None:
        log_probs = log_probs.masked_fill(padding_mask[:, :, None], 0.0)  # get_logits of fairseq writes -inf there
    log_probs = at_least_float32(log_probs).transpose(0, 1)  # [T, B, V], as CTC takes it
    present = targets.scores != -math.inf
    possible = targets.lengths + _repeats(targets) <= num_frames[:, None]
    weights = hypothesis_weights(targets.scores.masked_fill(~possible, -math.inf), weighting, beta)
    total, one_best = log_probs[:0].sum(), log_probs.new_zeros(())  # a zero with a gradient, for batches without labels
    for k in range(targets.symbols.shape[1]):
        usable = present[:, k] & possible[:, k]
        if not bool(usable.any()):
            continue
        rows = usable.nonzero()[:, 0]
        lengths = targets.lengths[rows, k]
        loss = F.ctc_loss(
            log_probs[:, rows], targets.symbols[rows, k], num_frames[rows], lengths, blank, reduction="none"
        )
        loss = loss / lengths.clamp(min=1)
        total = total + (weights[rows, k] * loss).sum()
        if k == 0:
            one_best = loss.detach().sum()
    num_scored = int((weights.sum(dim=1) > 0).sum())
    return SequenceLoss(total, one_best, num_scored, int((present & ~possible).sum()))


def _frames(log_probs: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Valid frames per row, [B] int64."""
    if log_probs.dim() != 3:
        raise ValueError(f"`log_probs` must be [B, T, V], but has shape {tuple(log_probs.shape)}")
    batch, frames, _ = log_probs.shape
    if padding_mask is None:
        return torch.full((batch,), frames, dtype=torch.int64, device=log_probs.device)
    if padding_mask.shape != (batch, frames):
        raise ValueError(
            f"`padding_mask` must be [B, T] = {(batch, frames)}, one value per frame, but is {tuple(padding_mask.shape)}"
        )
    if bool((padding_mask[:, :-1] & ~padding_mask[:, 1:]).any()):
        raise ValueError(
            "`padding_mask` must pad the end of rows, as CTC counts frames from the start, but pads before"
        )
    return (~padding_mask).sum(dim=1)


def _symbol_mask(targets: NbestTargets) -> Tensor:
    """[B, K, N], True = a symbol of a hypothesis that is there."""
    positions = torch.arange(targets.symbols.shape[2], device=targets.symbols.device)
    return (positions < targets.lengths[:, :, None]) & (targets.scores != -math.inf)[:, :, None]


def _repeats(targets: NbestTargets) -> Tensor:
    """Symbols that equal the one before them, between which CTC needs a blank, [B, K]."""
    equal = targets.symbols[:, :, 1:] == targets.symbols[:, :, :-1]
    return (equal & _symbol_mask(targets)[:, :, 1:]).sum(dim=2)


def _check_targets(targets: NbestTargets, log_probs: Tensor, blank: int) -> None:
    batch, _, num_symbols = log_probs.shape
    if len(targets.symbols) != batch:
        raise ValueError(f"`targets` must be of the {batch} utterances of the batch, but are of {len(targets.symbols)}")
    if not 0 <= blank < num_symbols:
        raise ValueError(f"`blank` must be one of the {num_symbols} symbols, but is {blank}")
    used = targets.symbols[_symbol_mask(targets)]
    if bool(((used < 0) | (used >= num_symbols) | (used == blank)).any()):
        raise ValueError(
            f"targets must be symbols from 0 to {num_symbols - 1} other than the blank, {blank}, but hold "
            f"{sorted(set(used.tolist()) - (set(range(num_symbols)) - {blank}))[:5]}; n-best file and model must have one dictionary"
        )
