"""Filters for text that a recogniser wrote: which pseudo-labels are kept before anybody trains on them.

Recognisers that fail do it in a few ways: they loop, they invent, they fall silent, they are unsure. Each way has a measure here, a
pure function, and `TextFilters` holds the thresholds.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

CODECS = ("zlib", "gzip")
DEFAULT_RATIO = {"zlib": 2.4, "gzip": 1.5}  # Whisper's threshold, and the one in use with gzip, whose header is longer

MAX_NGRAM = 4  # words of the longest loop that is looked for


def compression_ratio(text: str, codec: str = "zlib") -> float:
    """len(utf8) / len(compressed utf8): how much of a text repeats itself  (Radford et al., 2022, section 4.5).

    Whisper compresses with zlib. gzip is the same stream behind 12 more bytes of header, which weigh on short texts.

    Args:
        codec: ``zlib`` or ``gzip``, at their default levels.
    Returns:
        0 for an empty text.
    """
    if codec not in CODECS:
        raise ValueError(f"`codec` must be one of {', '.join(CODECS)}, but is {codec!r}")
    data = text.encode()
    # Python's own defaults differ: 6 for zlib, 9 for gzip
    compressed = zlib.compress(data) if codec == "zlib" else gzip.compress(data, mtime=0)
    return len(data) / len(compressed)


def characters_per_second(text: str, seconds: float) -> float:
    """Characters, spaces left out, per second of audio."""
    return sum(not c.isspace() for c in text) / seconds


def word_ratio(text: str, reference: str) -> float:
    """Words for each word of the reference; of an empty reference infinitely many, or 1 where both are empty."""
    num_words, num_reference = len(text.split()), len(reference.split())
    if num_reference == 0:
        return math.inf if num_words else 1.0
    return num_words / num_reference


def longest_loop(text: str, max_ngram: int = MAX_NGRAM) -> int:
    """How often a phrase of 1 to ``max_ngram`` words stands there in a row, at most: "no no no" 3, "go on go on" 2.

    Returns:
        1 where nothing repeats, 0 for an empty text.
    """
    words = text.split()
    longest = min(len(words), 1)
    for n in range(1, max_ngram + 1):
        equal = 0  # words in a row that equal the one n places before
        for i in range(n, len(words)):
            equal = equal + 1 if words[i] == words[i - n] else 0
            longest = max(longest, equal // n + 1)
    return longest


@dataclass(frozen=True)
class Candidate:
    """A text to be judged.

    Args:
        text: words with spaces between them.
        seconds: length of its audio.
        confidence: mean posterior of its symbols, in [0, 1].
        reference: what is known to be said, or None.
        score: log-probability per symbol, natural logarithm, at most 0.
    """

    text: str
    seconds: float
    confidence: float
    reference: str | None = None
    score: float = 0.0


@dataclass(frozen=True)
class TextFilters:
    """Thresholds; None turns a filter off. An empty text is always removed.

    Args:
        codec: compressor of the compression ratio, ``zlib`` or ``gzip``.
        max_compression_ratio: remove texts that compress better than this.
        max_loop: remove texts with a phrase that stands there more often than this in a row.
        min_chars_per_second, max_chars_per_second: remove texts that are too short or too long for their audio.
        min_word_ratio, max_word_ratio: remove texts with fewer or more words for each word of their reference.
        min_confidence: remove texts whose mean posterior is lower.
        min_score: remove texts whose log-probability per symbol is lower (Park et al., 2020, normalise theirs by length, too).
    Raises:
        ValueError: a threshold out of its range, or a lower limit above the upper one.
    """

    codec: str = "zlib"
    max_compression_ratio: float | None = None
    max_loop: int | None = None
    min_chars_per_second: float | None = None
    max_chars_per_second: float | None = None
    min_word_ratio: float | None = None
    max_word_ratio: float | None = None
    min_confidence: float | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"`codec` must be one of {', '.join(CODECS)}, but is {self.codec!r}")
        limits = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("codec", "min_score") and value is not None
        }
        for name, value in limits.items():
            if not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, but is {value}; leave it out to filter nothing")
        if not 0 <= (self.min_confidence or 0) <= 1:
            raise ValueError(f"`min_confidence` must be in [0, 1], a mean posterior, but is {self.min_confidence}")
        if self.min_score is not None and not self.min_score <= 0:
            raise ValueError(
                f"`min_score` must be at most 0, the logarithm of a probability, but is {self.min_score}; -0.5 keeps 61% per symbol"
            )
        if self.max_loop == 0:
            raise ValueError("`max_loop` must be at least 1, since every phrase stands there once, but is 0")
        for name in ("chars_per_second", "word_ratio"):
            low, high = limits.get(f"min_{name}", 0), limits.get(f"max_{name}", math.inf)
            if low > high:
                raise ValueError(f"`min_{name}` must be at most `max_{name}`, but they are {low} and {high}")

    @property
    def needs_reference(self) -> bool:
        return self.min_word_ratio is not None or self.max_word_ratio is not None

    @property
    def names(self) -> list[str]:
        """What `judge` may answer, in the order in which it looks."""
        return ["empty", *(name for name, limit, _ in self._rules() if limit is not None)]

    def judge(self, candidate: Candidate) -> str | None:
        """Name of the first filter that removes a text, or None where it stays.

        Raises:
            ValueError: there is a limit on words of a reference, but no reference.
        """
        if not candidate.text.split():
            return "empty"
        for name, limit, removes in self._rules():
            if limit is not None and removes(candidate, limit):
                return name
        return None

    def to_dict(self) -> dict[str, Any]:
        """The thresholds that are set, for JSON."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if self.max_compression_ratio is None:
            del values["codec"]
        return values

    def _rules(self) -> Sequence[tuple[str, float | None, Callable[[Candidate, float], bool]]]:
        """Name, threshold, and whether a text is removed at it."""
        return (
            (
                "compression_ratio",
                self.max_compression_ratio,
                lambda c, most: compression_ratio(c.text, self.codec) > most,
            ),
            ("loop", self.max_loop, lambda c, most: longest_loop(c.text) > most),
            ("too_slow", self.min_chars_per_second, lambda c, least: characters_per_second(c.text, c.seconds) < least),
            ("too_fast", self.max_chars_per_second, lambda c, most: characters_per_second(c.text, c.seconds) > most),
            ("too_few_words", self.min_word_ratio, lambda c, least: word_ratio(c.text, _reference(c)) < least),
            ("too_many_words", self.max_word_ratio, lambda c, most: word_ratio(c.text, _reference(c)) > most),
            ("confidence", self.min_confidence, lambda c, least: c.confidence < least),
            ("score", self.min_score, lambda c, least: c.score < least),
        )


def _reference(candidate: Candidate) -> str:
    if candidate.reference is None:
        raise ValueError(
            "`min_word_ratio` and `max_word_ratio` compare with what was said, but there is no reference; give one, or leave them out"
        )
    return candidate.reference
