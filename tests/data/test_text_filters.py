"""Filters of pseudo-labels: the published test vectors, each filter's edge, their order, and the errors of bad thresholds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.data.text_filters import (
    Candidate,
    TextFilters,
    characters_per_second,
    compression_ratio,
    longest_loop,
    word_ratio,
)


@pytest.mark.parametrize(("repeats", "gzip", "zlib"), [(5, 0.893, 1.562), (10, 1.786, 3.125), (20, 3.571, 6.25)])
def test_compression_ratio_has_the_known_values(repeats: int, gzip: float, zlib: float) -> None:
    text = "yeah " * repeats
    assert compression_ratio(text, "gzip") == pytest.approx(gzip, abs=5.1e-4)  # 1.5625 is printed as 1.562
    assert compression_ratio(text) == pytest.approx(zlib, abs=5.1e-4)


def test_compression_ratio_counts_bytes_of_utf8() -> None:
    assert compression_ratio("é") == 2 / 10 and compression_ratio("e") == 1 / 9
    assert compression_ratio("") == 0


def test_a_codec_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="`codec` must be one of zlib, gzip, but is 'bz2'"):
        compression_ratio("a", "bz2")
    with pytest.raises(ValueError, match="`codec` must be one of zlib, gzip, but is 'bz2'"):
        TextFilters(codec="bz2")


def slow_longest_loop(words: list[str], max_ngram: int) -> int:
    longest = min(len(words), 1)
    for n in range(1, max_ngram + 1):
        for start in range(len(words)):
            phrase, times = words[start : start + n], 0
            while len(phrase) == n and words[start + times * n : start + (times + 1) * n] == phrase:
                times += 1
            longest = max(longest, times)
    return longest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=14), st.integers(1, 4))
def test_the_longest_loop_is_a_search_over_all_places(words: list[str], max_ngram: int) -> None:
    assert longest_loop(" ".join(words), max_ngram) == slow_longest_loop(words, max_ngram)


def test_measures() -> None:
    assert longest_loop("go on go on stop") == 2 and longest_loop("no no no") == 3
    assert characters_per_second("ab c", 1.5) == 2
    assert word_ratio("a b c", "d e") == 1.5
    assert word_ratio("", "") == 1 and word_ratio("a", "") == math.inf


@pytest.mark.parametrize(
    ("filters", "stays", "goes", "name"),
    [
        (TextFilters(max_compression_ratio=2.4), "yeah " * 5, "yeah " * 10, "compression_ratio"),
        (TextFilters("gzip", 1.5), "yeah " * 5, "yeah " * 10, "compression_ratio"),
        (TextFilters(max_loop=2), "no no", "no no no", "loop"),
        (TextFilters(min_chars_per_second=2), "abcd", "abc", "too_slow"),
        (TextFilters(max_chars_per_second=2), "abcd", "abcde", "too_fast"),
        (TextFilters(min_word_ratio=0.5), "a", "", "empty"),
        (TextFilters(min_word_ratio=1), "a b", "a", "too_few_words"),
        (TextFilters(max_word_ratio=1.5), "a b c", "a b c d", "too_many_words"),
    ],
)
def test_each_filter_removes_what_is_beyond_its_threshold(
    filters: TextFilters, stays: str, goes: str, name: str
) -> None:
    assert filters.judge(Candidate(stays, 2.0, 0.9, "x y")) is None
    assert filters.judge(Candidate(goes, 2.0, 0.9, "x y")) == name
    assert name in filters.names


def test_confidence_is_a_lower_limit() -> None:
    filters = TextFilters(min_confidence=0.9)
    assert filters.judge(Candidate("a", 1.0, 0.9)) is None
    assert filters.judge(Candidate("a", 1.0, 0.89)) == "confidence"


def test_score_is_a_lower_limit() -> None:
    filters = TextFilters(min_score=-0.5)
    assert filters.judge(Candidate("a", 1.0, 0.9, None, -0.5)) is None
    assert filters.judge(Candidate("a", 1.0, 0.9, None, -0.51)) == "score"
    with pytest.raises(ValueError, match=r"`min_score` must be at most 0, the logarithm of a probability, but is 0\.5"):
        TextFilters(min_score=0.5)


def test_filters_run_in_order_and_a_text_is_removed_once() -> None:
    filters = TextFilters(max_compression_ratio=2.4, max_loop=2, max_chars_per_second=1, min_confidence=0.9)
    assert filters.names == ["empty", "compression_ratio", "loop", "too_fast", "confidence"]
    assert filters.judge(Candidate("yeah " * 10, 1.0, 0.1)) == "compression_ratio"
    assert filters.judge(Candidate("yeah yeah yeah", 1.0, 0.1)) == "loop"
    assert filters.judge(Candidate("yeah", 1.0, 0.1)) == "too_fast"
    assert filters.judge(Candidate("yeah", 9.0, 0.1)) == "confidence"


def test_without_thresholds_only_empty_texts_go() -> None:
    filters = TextFilters()
    assert filters.names == ["empty"] and filters.to_dict() == {}
    assert filters.judge(Candidate("yeah " * 100, 0.1, 0.0)) is None
    assert filters.judge(Candidate("  ", 1.0, 1.0)) == "empty"


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"max_compression_ratio": -1.0}, "`max_compression_ratio` must be at least 0, but is -1.0"),
        ({"max_word_ratio": math.nan}, "`max_word_ratio` must be at least 0, but is nan"),
        ({"min_confidence": 1.5}, r"`min_confidence` must be in \[0, 1\], a mean posterior, but is 1.5"),
        ({"max_loop": 0}, "`max_loop` must be at least 1"),
        (
            {"min_chars_per_second": 9.0, "max_chars_per_second": 2.0},
            "`min_chars_per_second` must be at most `max_chars_per_second`, but they are 9.0 and 2.0",
        ),
        ({"min_word_ratio": 2.0, "max_word_ratio": 1.0}, "`min_word_ratio` must be at most `max_word_ratio`"),
    ],
)
def test_thresholds_out_of_range_are_named(thresholds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextFilters(**thresholds)  # type: ignore[arg-type]


def test_a_limit_on_words_needs_a_reference() -> None:
    filters = TextFilters(max_word_ratio=1.5)
    assert filters.needs_reference and not TextFilters().needs_reference
    with pytest.raises(ValueError, match="there is no reference; give one, or leave them out"):
        filters.judge(Candidate("a", 1.0, 1.0))
