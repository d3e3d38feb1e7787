"""Greedy CTC decoding: log-probabilities per frame to symbols, the step between the model and its transcript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CtcHypothesis:
    """What was read out of one utterance.

    Attributes:
        tokens: symbols, [N] int64.
        score: log-probability, natural logarithm, blanks included: of the best path where it was decoded greedily, of all
            paths of the tokens behind a prefix beam search, with the weighted language model behind a decoder that has one.
        positional_scores: log-probability of each symbol's frames, [N] float32.
        timesteps: frame at which each symbol begins, [N] int64 (at 50 Hz for the released models).
        ends: frame behind the last one of each symbol, [N] int64.
        words: those of the lexicon where there was one; None: the symbols say.
    """

    tokens: Tensor
    score: float
    positional_scores: Tensor
    timesteps: Tensor
    ends: Tensor
    words: tuple[str, ...] | None = None


def greedy_decode(log_probs: Tensor, padding_mask: Tensor | None, blank: int) -> list[CtcHypothesis]:
    """Best-path decoding  (Graves et al., 2006, eq. 4).

        path_t = argmax_v log p_t(v);   tokens = path without repeats, then without blanks
        score = sum_t log p_t(path_t);   positional_scores_n = the same sum over the frames of symbol n

    Only valid frames are looked at, wherever they stand in the row: padded ones may hold anything, -inf and NaN too.

    Args:
        log_probs: log-probabilities, [B, T, V], any float type.
        padding_mask: [B, T], True = padding, or None when every frame is valid.
        blank: index of the blank symbol.
    Returns:
        One hypothesis per row, on the CPU; a row without valid frames gives an empty one with score 0.
    Raises:
        ValueError: shapes do not fit, ``blank`` is no symbol, or a valid frame holds NaN.
    """
    check_log_probs(log_probs, padding_mask, blank)
    best, path = log_probs.float().max(dim=-1)  # [B, T] each
    best, path = best.cpu(), path.cpu()
    valid = torch.ones_like(path, dtype=torch.bool) if padding_mask is None else ~padding_mask.cpu()
    for row in range(len(path)):
        _check_numbers(best[row][valid[row]], row)
    return [_collapse(path[row], best[row], valid[row], blank) for row in range(len(path))]


def average_log_probs(log_probs: Sequence[Tensor]) -> Tensor:
    """Ensemble of models: log_softmax(mean_m log p_m), the normalised geometric mean; every tensor [B, T, V].

    Raises:
        ValueError: the models differ in their number of frames or symbols.
    """
    shapes = sorted({tuple(p.shape) for p in log_probs})
    if len(shapes) != 1:
        raise ValueError(
            f"models of an ensemble must give the same [B, T, V], but gave {shapes}; decode models of another frame rate or "
            "dictionary on their own"
        )
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.stack([p.float() for p in log_probs]).mean(0).log_softmax(-1)


def _collapse(path: Tensor, best: Tensor, valid: Tensor, blank: int) -> CtcHypothesis:
    """Path [T] and its log-probabilities [T] of one utterance -> hypothesis."""
    frames = valid.nonzero()[:, 0]
    path, best = path[frames], best[frames]
    symbols, run_of_frame, counts = torch.unique_consecutive(path, return_inverse=True, return_counts=True)
    scores = torch.zeros(len(symbols)).index_add_(0, run_of_frame, best)
    starts = counts.cumsum(0) - counts
    spoken = symbols != blank
    return CtcHypothesis(
        symbols[spoken],
        float(best.sum()),
        scores[spoken],
        frames[starts[spoken]],
        frames[(starts + counts - 1)[spoken]] + 1,
    )


def pack_valid_frames(log_probs: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Moves the valid frames of each row to its beginning, on the CPU.

    Returns:
        Log-probabilities [B, max number of valid frames, V] float64, 0 behind a row's end; numbers of valid frames [B] int64; and
        per row where these frames stood, [number] int64.
    Raises:
        ValueError: a valid frame holds NaN, or no symbol is possible in it.
    """
    log_probs = log_probs.detach().cpu().double()
    valid = torch.ones(log_probs.shape[:2], dtype=torch.bool) if padding_mask is None else ~padding_mask.cpu()
    lengths = valid.sum(1)
    packed = log_probs.new_zeros(len(log_probs), int(lengths.max()) if len(lengths) else 0, log_probs.shape[2])
    behind = torch.arange(packed.shape[1]) < lengths[:, None]
    packed[behind] = log_probs[valid]
    best = packed.amax(-1)
    for row in range(len(packed)):
        _check_numbers(best[row], row)
        if bool((best[row] == -torch.inf).any()):
            raise ValueError(
                f"`log_probs` of row {row} must leave a symbol possible in each valid frame, but are -inf for all; does the "
                "padding mask fit?"
            )
    return packed, lengths, [row.nonzero()[:, 0] for row in valid]


def _check_numbers(values: Tensor, row: int) -> None:
    if bool(values.isnan().any()):
        raise ValueError(
            f"`log_probs` of row {row} must be numbers in valid frames, but hold NaN; has the model diverged?"
        )


def check_log_probs(log_probs: Tensor, padding_mask: Tensor | None, blank: int) -> None:
    """Raises `ValueError` where the shapes [B, T, V] and [B, T] do not fit, or the blank is no symbol."""
    if log_probs.dim() != 3:
        raise ValueError(f"`log_probs` must be [B, T, V], but has shape {tuple(log_probs.shape)}")
    if padding_mask is not None and padding_mask.shape != log_probs.shape[:2]:
        raise ValueError(
            f"`padding_mask` must be [B, T] = {tuple(log_probs.shape[:2])}, one value per frame, but is {tuple(padding_mask.shape)}"
        )
    if not 0 <= blank < log_probs.shape[2]:
        raise ValueError(f"`blank` must be one of the {log_probs.shape[2]} symbols, but is {blank}")
