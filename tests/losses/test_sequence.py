"""n-best CTC loss: brute force over all paths, closed forms of the weights, padding, impossible hypotheses, gradients, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.losses.sequence import NbestTargets, hypothesis_weights, nbest_ctc_loss

BLANK = 0


def nbest(batch: list[list[tuple[list[int], float]]]) -> NbestTargets:
    """Per utterance (symbols, score) pairs -> tensors; what is left over holds nonsense that must not matter."""
    num_best = max(map(len, batch))
    longest = max(len(symbols) for row in batch for symbols, _ in row)
    symbols = torch.full((len(batch), num_best, longest), 99)
    lengths = torch.zeros(len(batch), num_best, dtype=torch.int64)
    scores = torch.full((len(batch), num_best), -math.inf)
    for b, row in enumerate(batch):
        for k, (hypothesis, score) in enumerate(row):
            symbols[b, k, : len(hypothesis)] = torch.tensor(hypothesis, dtype=torch.int64)
            lengths[b, k], scores[b, k] = len(hypothesis), score
    return NbestTargets(symbols, lengths, scores)


def random_log_probs(batch: int, frames: int, symbols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, symbols, generator=generator, dtype=torch.float64).log_softmax(-1)


def brute_force_ctc(log_probs: Tensor, target: list[int]) -> float:
    """-log of the sum over all paths of [T, V] that collapse to the target."""
    frames, symbols = log_probs.shape
    total = 0.0
    for path in itertools.product(range(symbols), repeat=frames):
        collapsed = [s for s, _ in itertools.groupby(path) if s != BLANK]
        if collapsed == target:
            total += math.exp(sum(float(log_probs[t, s]) for t, s in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("weighting", ["one_best", "uniform", "ranked"])
def test_is_a_loop_over_utterances_hypotheses_and_paths(weighting: str) -> None:
    log_probs = random_log_probs(2, 4, 3)
    rows: list[list[tuple[list[int], float]]] = [
        [([1, 2], -0.5), ([1, 1], -1.0), ([2], -2.5)],
        [([2, 1, 2], -0.1), ([1], -3.0)],
    ]
    expected = 0.0
    for b, row in enumerate(rows):
        raw = []
        for k, (_, score) in enumerate(row):
            rank = {"one_best": float(k == 0), "uniform": 1.0, "ranked": math.exp(-0.7 * k)}[weighting]
            raw.append(rank * math.exp(score))
        for value, (symbols, _) in zip(raw, row, strict=True):
            expected += value / sum(raw) * brute_force_ctc(log_probs[b], symbols) / len(symbols)
    found = nbest_ctc_loss(log_probs, None, nbest(rows), BLANK, weighting, beta=0.7)
    assert found.total.item() == pytest.approx(expected, rel=1e-6)
    first = sum(brute_force_ctc(log_probs[b], row[0][0]) / len(row[0][0]) for b, row in enumerate(rows))
    assert found.one_best.item() == pytest.approx(first, rel=1e-6)
    assert (found.num_scored, found.num_impossible) == (2, 0)


@pytest.mark.parametrize("weighting", ["one_best", "uniform", "ranked"])
def test_one_hypothesis_is_plain_ctc(weighting: str) -> None:
    log_probs = random_log_probs(2, 6, 4)
    targets = torch.tensor([[1, 2, 2], [3, 1, 0]])
    lengths = torch.tensor([3, 2])
    plain = F.ctc_loss(log_probs.transpose(0, 1), targets, torch.tensor([6, 6]), lengths, BLANK, reduction="none")
    found = nbest_ctc_loss(log_probs, None, nbest([[([1, 2, 2], -7.0)], [([3, 1], -0.2)]]), BLANK, weighting)
    torch.testing.assert_close(found.total, (plain / lengths).sum())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-30, 0), min_size=1, max_size=5), st.floats(0, 5))
def test_weights_sum_to_one_and_ranks_only_lower_those_behind(scores: list[float], beta: float) -> None:
    ordered = torch.tensor([sorted(scores, reverse=True)], dtype=torch.float64)
    uniform, ranked = (hypothesis_weights(ordered, kind, beta)[0] for kind in ("uniform", "ranked"))
    torch.testing.assert_close(uniform, ordered[0].softmax(0))
    torch.testing.assert_close(ranked.sum(), torch.ones((), dtype=torch.float64))
    assert ranked[0] >= uniform[0] - 1e-12
    torch.testing.assert_close(hypothesis_weights(ordered, "ranked", 0.0)[0], uniform)
    assert hypothesis_weights(ordered, "one_best")[0].tolist() == [1.0] + [0.0] * (len(scores) - 1)


def test_weights_in_closed_form() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    ranks = [1.0, math.exp(-2), math.exp(-4)]
    products = [r * p for r, p in zip(ranks, [0.5, 0.25, 0.25], strict=True)]
    expected = torch.tensor([[x / sum(products) for x in products]])
    torch.testing.assert_close(hypothesis_weights(scores, "ranked"), expected)
    missing = torch.tensor([[-1.0, -math.inf, -1.0], [-math.inf] * 3])
    ranked = hypothesis_weights(missing, "ranked", 1.0)
    torch.testing.assert_close(ranked[0], torch.tensor([1.0, 0.0, math.exp(-2)]) / (1 + math.exp(-2)))
    assert ranked[1].tolist() == [0.0] * 3


def test_padding_changes_nothing() -> None:
    lengths = [5, 3]
    rows: list[list[tuple[list[int], float]]] = [[([1, 2], -1.0), ([2], -2.0)], [([3, 1], -0.5)]]
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor(lengths)[:, None]
    expected = torch.zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(logits)
    for b, length in enumerate(lengths):
        single = logits[b : b + 1, :length].clone().requires_grad_()
        loss = nbest_ctc_loss(single.log_softmax(-1), None, nbest(rows[b : b + 1]), BLANK).total
        loss.backward()
        expected = expected + loss.detach()
        gradient[b, :length] = single.grad[0]
    batch = logits.clone().requires_grad_()
    filled = batch.log_softmax(-1).masked_fill(padding[:, :, None], math.nan)
    found = nbest_ctc_loss(filled, padding, nbest(rows), BLANK).total
    found.backward()
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(batch.grad, gradient)


def test_impossible_hypotheses_give_their_weight_to_the_others() -> None:
    log_probs = random_log_probs(1, 3, 3)
    both = nbest([[([1, 1, 2], -0.1), ([1, 2], -3.0)]])  # 3 symbols and a repeat need 4 frames
    alone = nbest([[([1, 2], -3.0)]])
    found = nbest_ctc_loss(log_probs, None, both, BLANK, "uniform")
    torch.testing.assert_close(found.total, nbest_ctc_loss(log_probs, None, alone, BLANK, "uniform").total)
    assert (found.num_scored, found.num_impossible) == (1, 1)
    assert found.one_best == 0


@pytest.mark.parametrize("weighting", ["one_best", "ranked"])
def test_an_utterance_without_a_possible_hypothesis_adds_zero(weighting: str) -> None:
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = nbest([[([1, 1], -0.1)], [([1, 2], -1.0)]])
    found = nbest_ctc_loss(logits.log_softmax(-1), None, targets, BLANK, weighting)
    found.total.backward()
    assert torch.isfinite(found.total) and (found.num_scored, found.num_impossible) == (1, 1)
    assert logits.grad is not None and logits.grad[0].count_nonzero() == 0 and logits.grad[1].count_nonzero() > 0


def test_without_any_hypothesis_the_loss_is_zero() -> None:
    targets = NbestTargets(
        torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2).long(), torch.full((1, 2), -math.inf)
    )
    log_probs = random_log_probs(1, 3, 3).requires_grad_()
    found = nbest_ctc_loss(log_probs, None, targets, BLANK)
    assert found.total == 0 and (found.num_scored, found.num_impossible) == (0, 0)
    found.total.backward()  # a batch of nothing must not stop a training
    assert log_probs.grad is not None and log_probs.grad.count_nonzero() == 0


def test_an_empty_hypothesis_is_the_path_of_blanks() -> None:
    log_probs = random_log_probs(1, 3, 3)
    found = nbest_ctc_loss(log_probs, None, nbest([[([], -0.1), ([1], -4.0)]]), BLANK, "one_best")
    torch.testing.assert_close(found.total, -log_probs[0, :, BLANK].sum())


def test_gradients() -> None:
    targets = nbest([[([1, 2], -0.5), ([2], -1.0)], [([2, 2], -0.3)]])
    padding = torch.tensor([[False] * 4, [False] * 3 + [True]])
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: nbest_ctc_loss(z.log_softmax(-1), padding, targets, BLANK).total, (logits,)
    )


def test_half_precision_is_computed_in_float32() -> None:
    log_probs = random_log_probs(1, 4, 3).bfloat16()
    targets = nbest([[([1, 2], -0.5)]])
    found = nbest_ctc_loss(log_probs, None, targets, BLANK)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, nbest_ctc_loss(log_probs.float(), None, targets, BLANK).total)


def test_errors_say_what_came() -> None:
    log_probs, one = random_log_probs(1, 3, 3), nbest([[([1], -0.5)]])
    with pytest.raises(ValueError, match="`weighting` must be one of one_best, uniform, ranked, but is 'best'"):
        nbest_ctc_loss(log_probs, None, one, BLANK, "best")
    with pytest.raises(ValueError, match=r"`beta` must be at least 0 and finite, but is -1\.0"):
        nbest_ctc_loss(log_probs, None, one, BLANK, beta=-1.0)
    with pytest.raises(ValueError, match=r"`scores` must be logarithms of probabilities, but hold NaN or \+inf"):
        nbest_ctc_loss(log_probs, None, nbest([[([1], math.nan)]]), BLANK)
    with pytest.raises(
        ValueError, match=r"from 0 to 2 other than the blank, 0, but hold \[0, 5\]; n-best file and model"
    ):
        nbest_ctc_loss(log_probs, None, nbest([[([1, 5, 0], -0.5)]]), BLANK)
    with pytest.raises(ValueError, match=r"`log_probs` must be \[B, T, V\], but has shape \(3, 3\)"):
        nbest_ctc_loss(log_probs[0], None, one, BLANK)
    with pytest.raises(ValueError, match=r"`padding_mask` must be \[B, T\] = \(1, 3\).*but is \(1, 2\)"):
        nbest_ctc_loss(log_probs, torch.zeros(1, 2, dtype=torch.bool), one, BLANK)
    with pytest.raises(ValueError, match="must pad the end of rows"):
        nbest_ctc_loss(log_probs, torch.tensor([[True, False, False]]), one, BLANK)
    with pytest.raises(ValueError, match="must be of the 2 utterances of the batch, but are of 1"):
        nbest_ctc_loss(random_log_probs(2, 3, 3), None, one, BLANK)
    with pytest.raises(ValueError, match="`blank` must be one of the 3 symbols, but is 3"):
        nbest_ctc_loss(log_probs, None, one, 3)
    with pytest.raises(ValueError, match=r"`symbols` must be \[B, K, N\].* are \(1, 1, 1\), \(1, 2\) and \(1, 1\)"):
        NbestTargets(one.symbols, torch.ones(1, 2).long(), one.scores)
