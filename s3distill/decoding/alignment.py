"""The best path of known symbols through a CTC model's frames: where each symbol begins, ends, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BestPath:
    """The most probable path of a symbol sequence.

    Attributes:
        starts, ends: first frame of each symbol, and the one behind its last, [N] int64.
        scores: log-probability of each symbol's frames, [N] float32.
        total: log-probability of the whole path, blanks included.
    """

    starts: Tensor
    ends: Tensor
    scores: Tensor
    total: float


def best_paths(
    frames: Tensor, lengths: Tensor, symbols: Sequence[Tensor], owners: Sequence[int], blank: int
) -> list[BestPath]:
    """Aligns symbol sequences to the frames of their utterances  (Viterbi; Graves et al., 2006, eq. 6 with max for sum).

        states = blank, y_1, blank, ..., y_N, blank
        a_t(s) = log p_t(s) + max(a_{t-1}(s), a_{t-1}(s-1), a_{t-1}(s-2) if s is a symbol other than that of s-2)

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
    if not symbols:
        return []
    counts = torch.tensor([len(y) for y in symbols])
    states = torch.full((len(symbols), 2 * int(counts.max()) + 1), blank)
    for row, y in enumerate(symbols):
        states[row, 1 : 2 * len(y) : 2] = y
    rows = torch.tensor(owners)
    final, total, moves = _forward(frames, rows, lengths[rows], states, counts)
    for row, score in enumerate(total.tolist()):
        if score == -math.inf:
            raise ValueError(
                f"{len(symbols[row])} symbols must fit into the {int(lengths[rows[row]])} frames of utterance {owners[row]}, with a "
                "blank between equal ones and none impossible, but have no path; is it the utterance's own transcript?"
            )
    path = _backward(final, lengths[rows], moves)
    return [
        _read(path[row, : int(lengths[owner])], frames[owner], states[row], float(total[row]))
        for row, owner in enumerate(owners)
    ]


def _forward(
    frames: Tensor, rows: Tensor, lengths: Tensor, states: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Last state [R] and log-probability [R] of each best path, and per frame how many states each state came up by, [R, S]."""
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 3::2] = states[:, 3::2] != states[:, 1:-2:2]
    scores = torch.full(states.shape, -math.inf, dtype=frames.dtype)
    scores[:, 0] = 0.0  # in front of the first frame; from here a path enters the first blank or the first symbol
    moves = []
    for frame in range(int(lengths.max())):
        step, skip = scores.roll(1, 1), scores.roll(2, 1).masked_fill(~may_skip, -math.inf)
        step[:, 0] = -math.inf
        best, move = torch.stack([scores, step, skip]).max(dim=0)
        new = best + frames[rows[:, None], frame, states]
        scores = torch.where((frame < lengths)[:, None], new, scores)
        moves.append(move.to(torch.int8))
    last = torch.stack([2 * counts, (2 * counts - 1).clamp(min=0)], dim=1)  # [R, 2]: the blank behind, the last symbol
    total, which = scores.gather(1, last).max(dim=1)
    return last.gather(1, which[:, None])[:, 0], total, moves


def _backward(final: Tensor, lengths: Tensor, moves: list[Tensor]) -> Tensor:
    """States of the paths, [R, T] int64; behind an utterance's end its last state."""
    path = torch.zeros(len(final), len(moves), dtype=torch.int64)
    state = final
    for frame in range(len(moves) - 1, -1, -1):
        path[:, frame] = state
        move = moves[frame].gather(1, state[:, None])[:, 0]
        state = torch.where(frame < lengths, state - move, state)
    return path


def _read(path: Tensor, frames: Tensor, states: Tensor, total: float) -> BestPath:
    """States [T] of one path -> where its symbols stand."""
    visited, run_of_frame, lengths = torch.unique_consecutive(path, return_inverse=True, return_counts=True)
    log_probs = frames[torch.arange(len(path)), states[path]]
    scores = torch.zeros(len(visited), dtype=frames.dtype).index_add_(0, run_of_frame, log_probs)
    ends = lengths.cumsum(0)
    spoken = visited % 2 == 1
    return BestPath((ends - lengths)[spoken], ends[spoken], scores[spoken].float(), total)
