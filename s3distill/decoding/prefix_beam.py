"""Lexicon-free CTC prefix beam search: log-probabilities per frame to the most probable symbol sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from s3distill.decoding.alignment import best_paths
from s3distill.decoding.ctc import CtcHypothesis, check_log_probs, pack_valid_frames
from s3distill.decoding.prefix_search import NEVER, PrefixSearch


def prefix_beam_search(
    log_probs: Tensor,
    padding_mask: Tensor | None,
    blank: int,
    beam: int = 50,
    nbest: int = 1,
    symbol_threshold: float | None = None,
) -> list[list[CtcHypothesis]]:
    """CTC prefix beam search without a lexicon  (Graves & Jaitly, 2014, Alg. 1; Hannun et al., 2014, Alg. 1).

        log P(y) = log sum_{paths of y} prod_t p_t(path_t)

    A prefix keeps the probability of its paths that end in a blank apart from that of the others, so that equal prefixes
    are merged exactly; after each frame the ``beam`` most probable ones stay. What is found is then scored over all of its paths
    (Graves et al., 2006, eq. 8), also those through dropped prefixes and pruned symbols. All utterances go through the frames
    together, on the CPU in float64; an utterance's result does not depend on the others.

    Args:
        log_probs: log-probabilities, [B, T, V], any float type.
        padding_mask: [B, T], True = padding, or None when every frame is valid.
        blank: index of the blank symbol.
        beam: prefixes that stay after each frame.
        nbest: hypotheses per utterance, at most ``beam``.
        symbol_threshold: in each frame only symbols within this many nats of its best one count, and the blank; frames with
            nothing but the blank left then take next to no time. None: all symbols.
    Returns:
        Per utterance up to ``nbest`` hypotheses, the best first, on the CPU: ``score`` = log P(y), ``positional_scores``,
        ``timesteps`` and ``ends`` from the best path of y. Without valid frames, an empty one with score 0.
    Raises:
        ValueError: shapes do not fit, a number is out of range, or a valid frame holds NaN.
    """
    check_log_probs(log_probs, padding_mask, blank)
    if beam < 1 or not 1 <= nbest <= beam:
        raise ValueError(f"`beam` must be at least 1 and `nbest` in [1, beam], but are {beam} and {nbest}")
    if symbol_threshold is not None and not symbol_threshold > 0:
        raise ValueError(f"`symbol_threshold` must be above 0 nats, or None for no limit, but is {symbol_threshold}")
    frames, lengths, places = pack_valid_frames(log_probs, padding_mask)
    searched, num_searched = frames, lengths
    if symbol_threshold is not None and frames.numel():
        searched, num_searched = _merge_blank_frames(_prune(frames, blank, symbol_threshold), lengths, blank)
    found = PrefixSearch(searched, num_searched, blank, beam).run(nbest)
    owners = [row for row, prefixes in enumerate(found) for _ in prefixes]
    texts = [tokens for prefixes in found for tokens, _ in prefixes]
    hypotheses: list[list[CtcHypothesis]] = [[] for _ in found]
    for row, tokens, path in zip(owners, texts, best_paths(frames, lengths, texts, owners, blank), strict=True):
        starts, ends = places[row][path.starts], places[row][path.ends - 1] + 1
        hypotheses[row].append(CtcHypothesis(tokens, path.log_prob, path.scores, starts, ends))
    # the whole probability decides: a beam loses the paths through prefixes that it dropped
    return [sorted(of_row, key=lambda h: -h.score) for of_row in hypotheses]


def _prune(frames: Tensor, blank: int, threshold: float) -> Tensor:
    """[B, T, V] with -inf where a symbol other than the blank is more than ``threshold`` below the frame's best one."""
    kept = frames >= frames.amax(-1, keepdim=True) - threshold
    kept[..., blank] = True
    return frames.masked_fill(~kept, NEVER)


def _merge_blank_frames(frames: Tensor, lengths: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Makes one frame of neighbours in which only the blank is left; exact: P(y) sums over the same paths."""
    valid = torch.arange(frames.shape[1]) < lengths[:, None]
    others = frames.clone()
    others[..., blank] = NEVER
    quiet = (others.amax(-1) == NEVER) & valid
    opens = valid & ~(quiet & quiet.roll(1, 1))
    opens[:, 0] = valid[:, 0]
    new_index = opens.cumsum(1) - 1  # frame -> merged frame
    num_new = opens.sum(1)
    merged = torch.full((len(frames), int(num_new.max()), frames.shape[2]), NEVER, dtype=frames.dtype)
    rows, times = opens.nonzero(as_tuple=True)
    merged[rows, new_index[rows, times]] = frames[rows, times]
    rows, times = (valid & ~opens).nonzero(as_tuple=True)
    blanks = merged[..., blank].contiguous()
    blanks.index_put_((rows, new_index[rows, times]), frames[rows, times, blank], accumulate=True)
    merged[..., blank] = blanks
    return merged, num_new
