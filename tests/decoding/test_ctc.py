"""Greedy CTC decoding against a slow loop, and what padding must not do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.decoding.ctc import average_log_probs, greedy_decode

BLANK = 0


def slow_decode(log_probs: Tensor, num_frames: int) -> tuple[list[int], float, list[float], list[int]]:
    """One row, frame by frame: log_probs [T, V] of which the first frames are valid."""
    tokens: list[int] = []
    scores: list[float] = []
    starts: list[int] = []
    total, previous = 0.0, None
    for t in range(num_frames):
        row = log_probs[t].tolist()
        symbol = max(range(len(row)), key=lambda v: row[v])
        total += row[symbol]
        if symbol != previous and symbol != BLANK:
            tokens.append(symbol)
            scores.append(0.0)
            starts.append(t)
        if symbol != BLANK:
            scores[-1] += row[symbol]
        previous = symbol
    return tokens, total, scores, starts


def path_log_probs(path: list[int], num_symbols: int = 4) -> Tensor:
    """Log-probabilities [1, T, V] whose best path is ``path``."""
    logits = torch.zeros(1, len(path), num_symbols)
    logits[0, torch.arange(len(path)), torch.tensor(path, dtype=torch.long)] = 3.0
    return logits.log_softmax(-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(2, 5))
def test_equals_the_slow_loop_and_single_decoding(seed: int, lengths: list[int], num_symbols: int) -> None:
    torch.manual_seed(seed)
    num_frames = max(*lengths, 1)
    log_probs = (2 * torch.randn(len(lengths), num_frames, num_symbols)).log_softmax(-1)
    padding_mask = torch.arange(num_frames) >= torch.tensor(lengths)[:, None]
    log_probs[padding_mask] = math.nan  # what stands in padding must not matter
    batch = greedy_decode(log_probs, padding_mask, BLANK)
    for row, length in enumerate(lengths):
        single = greedy_decode(log_probs[row : row + 1, :length], None, BLANK)[0]
        tokens, total, scores, starts = slow_decode(log_probs[row], length)
        for hypothesis in (batch[row], single):
            assert hypothesis.tokens.tolist() == tokens
            assert hypothesis.timesteps.tolist() == starts
            assert hypothesis.score == pytest.approx(total, abs=1e-4)
            torch.testing.assert_close(hypothesis.positional_scores, torch.tensor(scores, dtype=torch.float32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)), max_size=8))
def test_reads_back_what_a_path_spells(runs: list[tuple[int, int, int]]) -> None:
    """Each symbol stays for some frames, with blanks behind it: at least one where the next symbol is the same."""
    path: list[int] = []
    for i, (symbol, frames, blanks) in enumerate(runs):
        is_repeated = i + 1 < len(runs) and runs[i + 1][0] == symbol
        path += [symbol] * frames + [BLANK] * max(blanks, int(is_repeated))
    hypothesis = greedy_decode(path_log_probs([*path, BLANK]), None, BLANK)[0]
    assert hypothesis.tokens.tolist() == [symbol for symbol, _, _ in runs]


def test_a_blank_separates_equal_symbols_and_repeats_collapse() -> None:
    hypothesis = greedy_decode(path_log_probs([1, 1, 0, 1, 2, 2, 0, 3]), None, BLANK)[0]
    assert hypothesis.tokens.tolist() == [1, 1, 2, 3]
    assert hypothesis.timesteps.tolist() == [0, 3, 4, 7]


def test_another_blank_changes_what_is_read() -> None:
    log_probs = path_log_probs([1, 0, 2, 2])
    assert greedy_decode(log_probs, None, 0)[0].tokens.tolist() == [1, 2]
    assert greedy_decode(log_probs, None, 2)[0].tokens.tolist() == [1, 0]


def test_valid_frames_are_indexed_and_not_counted_from_the_left() -> None:
    log_probs = path_log_probs([3, 1, 2])
    mask = torch.tensor([[True, False, False]])
    hypothesis = greedy_decode(log_probs, mask, BLANK)[0]
    assert (hypothesis.tokens.tolist(), hypothesis.timesteps.tolist()) == ([1, 2], [1, 2])


def test_no_valid_frame_gives_an_empty_hypothesis() -> None:
    hypothesis = greedy_decode(torch.full((1, 2, 3), -math.inf), torch.ones(1, 2, dtype=torch.bool), BLANK)[0]
    assert hypothesis.tokens.tolist() == [] and hypothesis.score == 0.0
    assert hypothesis.tokens.dtype == hypothesis.timesteps.dtype == torch.int64


def test_ensemble_is_the_normalised_geometric_mean() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(2, 3, 4).log_softmax(-1) for _ in range(2))
    mean = average_log_probs([first, second])
    torch.testing.assert_close(mean.exp().sum(-1), torch.ones(2, 3))
    expected = (first.exp() * second.exp()).sqrt()
    torch.testing.assert_close(mean.exp(), expected / expected.sum(-1, keepdim=True))
    assert average_log_probs([first]) is first


def test_errors() -> None:
    log_probs = path_log_probs([1, 2])
    with pytest.raises(ValueError, match=r"`log_probs` must be \[B, T, V\], but has shape \(2, 4\)"):
        greedy_decode(log_probs[0], None, BLANK)
    with pytest.raises(ValueError, match=r"`padding_mask` must be \[B, T\] = \(1, 2\).*\(1, 320\)"):
        greedy_decode(log_probs, torch.zeros(1, 320, dtype=torch.bool), BLANK)
    with pytest.raises(ValueError, match="`blank` must be one of the 4 symbols, but is 4"):
        greedy_decode(log_probs, None, 4)
    log_probs[0, 1, 0] = math.nan
    with pytest.raises(ValueError, match="row 0 must be numbers in valid frames, but hold NaN"):
        greedy_decode(log_probs, None, BLANK)
    with pytest.raises(ValueError, match=r"must give the same \[B, T, V\].*\(1, 2, 4\), \(1, 3, 4\)"):
        average_log_probs([path_log_probs([1, 2]), path_log_probs([1, 2, 3])])
