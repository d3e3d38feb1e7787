"""CTC prefix beam search against all paths of small cases, and against a plain loop where a small beam drops prefixes."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.decoding.alignment import best_paths
from s3distill.decoding.ctc import CtcHypothesis, greedy_decode
from s3distill.decoding.prefix_beam import prefix_beam_search
from s3distill.decoding.prefix_search import PrefixSearch

SEEDS = st.integers(0, 2**31 - 1)


def spelled(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def all_sequences(log_probs: Tensor, blank: int) -> dict[tuple[int, ...], tuple[float, float]]:
    """Every symbol sequence of [T, V] -> log-probability over all of its paths, and of the best one."""
    table = log_probs.tolist()
    sums: dict[tuple[int, ...], float] = defaultdict(float)
    best: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(table)):
        score = sum(table[t][symbol] for t, symbol in enumerate(path))
        sums[spelled(path, blank)] += math.exp(score)
        best[spelled(path, blank)] = max(best[spelled(path, blank)], score)
    return {y: (math.log(p), best[y]) for y, p in sums.items() if p > 0}


def slow_beam(log_probs: Tensor, blank: int, beam: int) -> list[tuple[tuple[int, ...], float]]:
    """Hannun et al. (2014), Alg. 1, with dictionaries, in probabilities: [T, V] -> prefixes, the best first."""
    beams = {(): (1.0, 0.0)}
    for row in log_probs.double().exp().tolist():
        new: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for prefix, (ends_blank, ends_symbol) in beams.items():
            new[prefix][0] += row[blank] * (ends_blank + ends_symbol)
            for symbol in (s for s in range(len(row)) if s != blank):
                if prefix and prefix[-1] == symbol:
                    new[prefix][1] += row[symbol] * ends_symbol
                    new[(*prefix, symbol)][1] += row[symbol] * ends_blank
                else:
                    new[(*prefix, symbol)][1] += row[symbol] * (ends_blank + ends_symbol)
        beams = dict(sorted(((y, (b, s)) for y, (b, s) in new.items()), key=lambda item: -sum(item[1]))[:beam])
    return [(y, math.log(sum(parts))) for y, parts in beams.items() if sum(parts) > 0]


def read(hypotheses: list[CtcHypothesis]) -> list[tuple[tuple[int, ...], float]]:
    return [(tuple(h.tokens.tolist()), h.score) for h in hypotheses]


def assert_same(found: list[tuple[tuple[int, ...], float]], expected: list[tuple[tuple[int, ...], float]]) -> None:
    assert [y for y, _ in found] == [y for y, _ in expected]
    assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=1e-9)


def random_log_probs(seed: int, *shape: int, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(2, 4), st.data())
def test_a_beam_that_drops_nothing_gives_every_sequence_its_exact_probability(
    seed: int, num_frames: int, num_symbols: int, data: st.DataObject
) -> None:
    blank = data.draw(st.integers(0, num_symbols - 1))
    log_probs = random_log_probs(seed, 1, num_frames, num_symbols)
    expected = all_sequences(log_probs[0], blank)
    hypotheses = prefix_beam_search(log_probs, None, blank, beam=400, nbest=400)[0]
    assert {y for y, _ in read(hypotheses)} == set(expected)
    assert sum(math.exp(h.score) for h in hypotheses) == pytest.approx(1.0)
    assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
    for h in hypotheses:
        total, best = expected[tuple(h.tokens.tolist())]
        assert h.score == pytest.approx(total, abs=1e-9)
        assert _path_score(log_probs[0], h, blank) == pytest.approx(best, abs=1e-9)


def _path_score(log_probs: Tensor, h: CtcHypothesis, blank: int) -> float:
    """Log-probability of the path that starts and ends describe, blanks elsewhere; they must spell the tokens."""
    path = [blank] * len(log_probs)
    for n, (symbol, start, end) in enumerate(
        zip(h.tokens.tolist(), h.timesteps.tolist(), h.ends.tolist(), strict=True)
    ):
        path[start:end] = [symbol] * (end - start)
        own = float(log_probs[start:end, symbol].sum())
        assert end > start and float(h.positional_scores[n]) == pytest.approx(own, abs=1e-4)
    assert spelled(tuple(path), blank) == tuple(h.tokens.tolist())
    return sum(float(log_probs[t, symbol]) for t, symbol in enumerate(path))


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(2, 9), st.integers(1, 12))
def test_a_small_beam_keeps_what_the_plain_loop_keeps(seed: int, num_frames: int, num_symbols: int, beam: int) -> None:
    """Also where a prefix is dropped and found again while longer ones stayed, and with far more symbols than places."""
    log_probs = random_log_probs(seed, 1, num_frames, num_symbols)
    expected = slow_beam(log_probs[0], 0, beam)
    found = PrefixSearch(log_probs, torch.tensor([num_frames]), 0, beam).run(beam)[0]
    assert_same([(tuple(y.tolist()), score) for y, score in found], expected)
    hypotheses = read(prefix_beam_search(log_probs, None, 0, beam, nbest=beam)[0])
    assert {y for y, _ in hypotheses} == {y for y, _ in expected}
    assert all(score >= dict(expected)[y] - 1e-9 for y, score in hypotheses)  # with the paths that the beam lost


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.sampled_from([None, 2.0]))
def test_padded_is_unpadded(seed: int, lengths: list[int], threshold: float | None) -> None:
    num_frames = max(*lengths, 1) + 1
    log_probs = random_log_probs(seed, len(lengths), num_frames, 4)
    padding_mask = torch.arange(num_frames) >= torch.tensor(lengths)[:, None]
    padding_mask[0] = padding_mask[0].flip(0)  # padding in front counts as padding too
    log_probs[padding_mask] = math.nan
    batch = prefix_beam_search(log_probs, padding_mask, 0, 5, 3, threshold)
    for row, length in enumerate(lengths):
        single = log_probs[row : row + 1, ~padding_mask[row]]
        alone = prefix_beam_search(single, None, 0, 5, 3, threshold)[0]
        assert_same(read(batch[row]), read(alone))
        shift = num_frames - length if row == 0 else 0
        assert [h.timesteps.tolist() for h in batch[row]] == [(h.timesteps + shift).tolist() for h in alone]
        assert [h.ends.tolist() for h in batch[row]] == [(h.ends + shift).tolist() for h in alone]


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 10), st.floats(0.5, 4.0))
def test_a_threshold_is_the_search_without_the_symbols_below_it(seed: int, num_frames: int, threshold: float) -> None:
    log_probs = random_log_probs(seed, 2, num_frames, 4, sharpness=3.0)
    pruned = log_probs.clone()
    kept = pruned >= pruned.amax(-1, keepdim=True) - threshold
    kept[..., 0] = True
    pruned[~kept] = -math.inf
    mask = torch.zeros(2, num_frames, dtype=torch.bool)
    mask[1, num_frames // 2 + 1 :] = True  # rows of another length
    found = prefix_beam_search(log_probs, mask, 0, 100, 100, threshold)
    for row, hypotheses in enumerate(found):
        expected = slow_beam(pruned[row][~mask[row]], 0, 100)
        assert {y for y, _ in read(hypotheses)} == {y for y, _ in expected}


def test_the_sum_over_paths_can_beat_the_best_path() -> None:
    """Graves & Jaitly's point: two frames, blank 0.6 each: the best path is empty (0.36), but "a" has 0.64."""
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert greedy_decode(log_probs, None, 0)[0].tokens.tolist() == []
    best, second = prefix_beam_search(log_probs, None, 0, beam=4, nbest=2)[0]
    assert (best.tokens.tolist(), second.tokens.tolist()) == ([1], [])
    assert (best.score, second.score) == pytest.approx((math.log(0.64), math.log(0.36)), abs=1e-6)


def test_repeats_need_a_blank_between() -> None:
    sure = torch.full((1, 5, 3), 1e-4)
    sure[0, torch.arange(5), torch.tensor([1, 1, 0, 1, 2])] = 1.0
    best = prefix_beam_search((sure / sure.sum(-1, keepdim=True)).log(), None, 0, beam=8)[0][0]
    assert best.tokens.tolist() == [1, 1, 2]
    assert best.timesteps.tolist() == [0, 3, 4] and best.ends.tolist() == [2, 4, 5]


def test_beam_1_is_one_greedy_prefix_and_reads_what_is_clear() -> None:
    log_probs = random_log_probs(3, 3, 30, 6, sharpness=20.0)
    for row, hypotheses in enumerate(prefix_beam_search(log_probs, None, 0, beam=1)):
        assert hypotheses[0].tokens.tolist() == greedy_decode(log_probs[row : row + 1], None, 0)[0].tokens.tolist()


def test_long_utterances_keep_their_precision() -> None:
    """What the search alone sums over 400 frames is the CTC loss, less the paths through dropped prefixes."""
    log_probs = random_log_probs(5, 1, 400, 30, sharpness=8.0)
    (tokens, score) = PrefixSearch(log_probs, torch.tensor([400]), 0, 64).run(1)[0][0]
    loss = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), tokens[None], [400], [len(tokens)], reduction="sum")
    assert len(tokens) > 200 and -float(loss) - 0.2 < score < -float(loss)
    best = prefix_beam_search(log_probs.float(), None, 0, beam=64)[0][0]
    assert best.score == pytest.approx(-float(loss), abs=1e-3) and best.tokens.equal(tokens)


def test_no_valid_frame_gives_one_empty_hypothesis() -> None:
    for frames in (0, 2):
        mask = torch.ones(2, frames, dtype=torch.bool)
        for found in prefix_beam_search(torch.full((2, frames, 3), math.nan), mask, 0, beam=4, nbest=4):
            assert read(found) == [((), 0.0)]
    assert prefix_beam_search(torch.zeros(0, 4, 3), None, 0, 2) == []


def test_errors() -> None:
    log_probs = random_log_probs(0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"`beam` must be at least 1 and `nbest` in \[1, beam\], but are 2 and 3"):
        prefix_beam_search(log_probs, None, 0, 2, 3)
    with pytest.raises(ValueError, match="`symbol_threshold` must be above 0 nats, or None for no limit, but is 0"):
        prefix_beam_search(log_probs, None, 0, 2, 1, 0.0)
    with pytest.raises(ValueError, match="`blank` must be one of the 3 symbols, but is 3"):
        prefix_beam_search(log_probs, None, 3)
    with pytest.raises(ValueError, match="row 0 must be numbers in valid frames, but hold NaN"):
        prefix_beam_search(log_probs.clone().fill_(math.nan), None, 0)
    with pytest.raises(
        ValueError, match="row 0 must leave a symbol possible in each valid frame, but are -inf for all"
    ):
        prefix_beam_search(log_probs.clone().fill_(-math.inf), None, 0)
    with pytest.raises(ValueError, match=r"2 symbols must fit into the 2 frames of utterance 0, with a blank between"):
        best_paths(log_probs, torch.tensor([2]), [torch.tensor([1, 1])], [0], 0)
