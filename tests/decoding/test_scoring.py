"""Error rates against counts by hand and a plain edit distance."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.decoding.scoring import bootstrap_interval, error_rates

pytest.importorskip("jiwer")


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row, above = [i], row
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_counts_by_hand() -> None:
    rates = error_rates(["A B C", "D"], ["A X C Y", ""])
    words = rates.words
    assert (words.substitutions, words.deletions, words.insertions, words.num_reference) == (1, 1, 1, 4)
    assert rates.wer == pytest.approx(75.0)
    assert (rates.num_utterances, rates.num_wrong) == (2, 2)
    # letters: A|B|C -> A|X|C|Y: 1 substituted, 2 inserted; D -> nothing: 1 deleted
    assert rates.uer == pytest.approx(100 * 4 / 6)
    assert str(rates).startswith(
        "WER 75.00% (3 errors in 4 words: 1 substituted, 1 deleted, 1 inserted), UER 66.67% (4 errors"
    )
    # without units given they are the characters; resampled, each utterance may be the only one: 2 of 3 or 1 of 1 wrong
    assert rates.cer == rates.uer and rates.to_dict()["character"]["errors"] == 4
    assert rates.wer_interval == pytest.approx((100 * 2 / 3, 100.0))
    assert str(rates).endswith("WER in [66.67, 100.00] with 95% confidence")


def test_units_are_compared_as_they_are() -> None:
    rates = error_rates(["AB"], ["AB"], ["A B |"], ["A B"])
    assert rates.wer == 0.0 and rates.num_wrong == 0
    assert rates.units.deletions == 1 and rates.uer == pytest.approx(100 / 3)
    assert rates.to_dict()["unit"] == {
        "substitutions": 0,
        "deletions": 1,
        "insertions": 0,
        "num_reference": 3,
        "errors": 1,
    }


TEXTS = st.lists(st.sampled_from("ABC"), max_size=6).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4).filter(lambda pairs: any(r for r, _ in pairs)))
def test_rates_are_edit_distances_over_all_utterances(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    rates = error_rates(references, hypotheses)
    errors = sum(edit_distance(r.split(), h.split()) for r, h in pairs)
    assert rates.words.errors == errors
    assert rates.wer == pytest.approx(100 * errors / sum(len(r.split()) for r in references))
    assert error_rates(references, references).wer == 0.0


def test_characters_do_not_depend_on_the_units() -> None:
    """Pieces: one wrong unit of two, but one wrong character of six with the space."""
    rates = error_rates(["AB CDE"], ["AB CDX"], ["\u2581AB \u2581CDE"], ["\u2581AB \u2581CDX"])
    assert rates.uer == 50.0 and rates.cer == pytest.approx(100 / 6)


def test_bootstrap_interval_is_that_of_the_binomial() -> None:
    """One word an utterance, right or wrong: the rate of a resample is binomial(n, p) / n."""
    n, wrong = 400, 80
    low, high = bootstrap_interval([1] * wrong + [0] * (n - wrong), [1] * n, num_resamples=4000)
    deviation = 100 * (0.2 * 0.8 / n) ** 0.5
    assert low == pytest.approx(20 - 1.96 * deviation, abs=0.35) and high == pytest.approx(
        20 + 1.96 * deviation, abs=0.35
    )
    half = bootstrap_interval([1] * wrong + [0] * (n - wrong), [1] * n, confidence=0.5)
    assert low < half[0] < 20 < half[1] < high


def test_bootstrap_interval_resamples_whole_utterances() -> None:
    """All errors in one utterance: twice the errors or none, where single words would hardly vary."""
    low, high = bootstrap_interval([30, 0], [50, 50])
    assert (low, high) == (0.0, 60.0)
    assert bootstrap_interval([1, 2], [3, 4], seed=1) == bootstrap_interval([1, 2], [3, 4], seed=1)
    assert bootstrap_interval([3] * 7, [9] * 7) == pytest.approx((100 / 3, 100 / 3)), "equal utterances leave no doubt"
    assert bootstrap_interval([1, 0], [2, 0])[1] == 50.0, "silence alone has no rate"


def test_bootstrap_interval_errors() -> None:
    with pytest.raises(
        ValueError, match="errors and lengths of the same utterances with something said, but there are 2 and 1"
    ):
        bootstrap_interval([1, 2], [3])
    with pytest.raises(
        ValueError, match=r"`confidence` must be in \(0, 1\) and `num_resamples` at least 1, but are 1\.5 and 1000"
    ):
        bootstrap_interval([1], [3], confidence=1.5)


def test_errors() -> None:
    with pytest.raises(ValueError, match="there are 2 references and 1 hypotheses"):
        error_rates(["A", "B"], ["A"])
    with pytest.raises(ValueError, match="at least one of their words, but all 2 are empty"):
        error_rates(["", " "], ["A", "B"])
    with pytest.raises(ValueError, match="but all 0 are empty"):
        error_rates([], [])
    with pytest.raises(ValueError, match="together, or neither"):
        error_rates(["A"], ["A"], ["A"])
    with pytest.raises(ValueError, match="`reference_units` must have a line for each of the 1 references, but has 2"):
        error_rates(["A"], ["A"], ["A", "B"], ["A", "B"])
