"""The best path of known symbols through a CTC model's frames: where each symbol begins, ends, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -math.inf
STATES_AT_ONCE = 2**16  # of all sequences together: a frame of them stays in the processor's cache


@dataclass(frozen=True)
class BestPath:
    """The most probable path of a symbol sequence.

    Attributes:
        starts, ends: first frame of each symbol, and the one behind its last, [N] int64.
        scores: log-probability of each symbol's frames, [N] float32.
        total: log-probability of the whole path, blanks included.
        log_prob: log-probability of the sequence, over all of its paths.
    """

    starts: Tensor
    ends: Tensor
    scores: Tensor
    total: float
    log_prob: float


def best_paths(
    frames: Tensor, lengths: Tensor, symbols: Sequence[Tensor], owners: Sequence[int], blank: int
) -> list[BestPath]:
    """Aligns symbol sequences to the frames of their utterances  (Graves et al., 2006, eq. 6-8; with max for sum: Viterbi).

        states = blank, y_1, blank, ..., y_N, blank
        a_t(s) = log p_t(s) + log (exp a_{t-1}(s) + exp a_{t-1}(s-1) + exp a_{t-1}(s-2) if s is a symbol other than that of s-2)
        log P(y) = log (exp a_T(2N) + exp a_T(2N-1))

    Args:
        frames: log-probabilities, [B, T, V].
        lengths: frames that count from the beginning of each row, [B].
        symbols: R sequences, [N] int64 each, without blanks.
        owners: the row that each of them belongs to.
        blank: index of the blank symbol.
    Returns:
        A path per sequence.
    Raises:
        ValueError: a sequence needs more frames than its utterance has, or one of its symbols is impossible there.
    """
    # the longest utterances first, so that those which have ended leave the batch
    order = sorted(range(len(symbols)), key=lambda row: -int(lengths[owners[row]]))
    found: dict[int, BestPath] = {}
    while order:
        num_rows = max(1, STATES_AT_ONCE // (2 * max(len(symbols[row]) for row in order) + 1))
        chunk, order = order[:num_rows], order[num_rows:]
        paths = _align([symbols[row] for row in chunk], [owners[row] for row in chunk], frames, lengths, blank)
        found |= zip(chunk, paths, strict=True)
    return [found[row] for row in range(len(symbols))]


def _align(symbols: list[Tensor], owners: list[int], frames: Tensor, lengths: Tensor, blank: int) -> Iterator[BestPath]:
    """`best_paths` of sequences whose utterances are ordered by length, the longest first."""
    rows, counts = torch.tensor(owners), torch.tensor([len(y) for y in symbols])
    states = torch.full((len(symbols), 2 * int(counts.max()) + 1), blank)
    for row, y in enumerate(symbols):
        states[row, 1 : 2 * len(y) : 2] = y
    best, sums, moves = _forward(frames, rows, lengths[rows], states)
    last = torch.stack([2 * counts, (2 * counts - 1).clamp(min=0)], dim=1)  # [R, 2]: the blank behind, the last symbol
    totals, which = best.gather(1, last).max(dim=1)
    log_probs = torch.where(counts > 0, sums.gather(1, last).logsumexp(1), sums[:, 0])
    path = _backward(last.gather(1, which[:, None])[:, 0], moves)
    for row, (owner, total, log_prob) in enumerate(zip(owners, totals.tolist(), log_probs.tolist(), strict=True)):
        num_frames = int(lengths[owner])
        if total == NEVER:
            raise ValueError(
                f"{len(symbols[row])} symbols must fit into the {num_frames} frames of utterance {owner}, with a blank between equal "
                "ones and none impossible, but have no path; is it the utterance's own transcript?"
            )
        yield _read(path[row, :num_frames], frames[owner], states[row], total, log_prob)


def _forward(frames: Tensor, rows: Tensor, lengths: Tensor, states: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probability of the best path into each state behind an utterance's end, of all paths [R, S], and how they came there.

    Args:
        rows, lengths: row of ``frames`` and number of frames of each sequence, [R], the longest first.
        states: symbols, [R, S].
    Returns:
        The third: per frame, by how many states the best path into each state came up, [active rows, S] int8.
    """
    no_skip = torch.full(states.shape, NEVER, dtype=frames.dtype)
    no_skip[:, 3::2].masked_fill_(states[:, 3::2] != states[:, 1:-2:2], 0.0)
    # two states in front that no path is in, so that "one or two states before" is a view
    best = torch.full((len(states), states.shape[1] + 2), NEVER, dtype=frames.dtype)
    best[:, 2] = 0.0  # in front of the first frame; from here a path enters the first blank or the first symbol
    sums, moves = best.clone(), []
    for frame in range(int(lengths.max())):
        active = int((lengths > frame).sum())
        emitted = frames[rows[:active], frame].gather(1, states[:active])
        before, skips = best[:active], no_skip[:active]
        steps, jumps = before[:, 1:-1], before[:, :-2] + skips
        came = torch.maximum(before[:, 2:], steps)
        move = (steps > before[:, 2:]).to(torch.int8).masked_fill_(jumps > came, 2)
        moves.append(move)
        mass = sums[:active]
        reached = torch.logaddexp(torch.logaddexp(mass[:, 2:], mass[:, 1:-1]), mass[:, :-2] + skips)
        torch.add(torch.maximum(came, jumps), emitted, out=best[:active, 2:])
        torch.add(reached, emitted, out=sums[:active, 2:])
    return best[:, 2:], sums[:, 2:], moves


def _backward(final: Tensor, moves: list[Tensor]) -> Tensor:
    """States of the paths, [R, T] int64; behind an utterance's end 0."""
    path = torch.zeros(len(final), len(moves), dtype=torch.int64)
    state = final.clone()
    for frame in range(len(moves) - 1, -1, -1):
        active = len(moves[frame])
        path[:active, frame] = state[:active]
        state[:active] -= moves[frame].gather(1, state[:active, None])[:, 0]
    return path


def _read(path: Tensor, frames: Tensor, states: Tensor, total: float, log_prob: float) -> BestPath:
    """States [T] of one path -> where its symbols stand."""
    visited, run_of_frame, lengths = torch.unique_consecutive(path, return_inverse=True, return_counts=True)
    log_probs = frames[torch.arange(len(path)), states[path]]
    scores = torch.zeros(len(visited), dtype=frames.dtype).index_add_(0, run_of_frame, log_probs)
    ends = lengths.cumsum(0)
    spoken = visited % 2 == 1
    return BestPath((ends - lengths)[spoken], ends[spoken], scores[spoken].float(), total, log_prob)
