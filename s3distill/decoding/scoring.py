"""Error rates of transcripts: words, units and characters, counted by jiwer, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50  # so that a large test set needs little memory


@dataclass(frozen=True)
class EditCounts:
    """Edits that turn the references into the hypotheses, summed over all utterances."""

    substitutions: int
    deletions: int
    insertions: int
    num_reference: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def error_rate(self) -> float:
        """Errors per reference item, percent; above 100 where much was inserted."""
        return 100.0 * self.errors / self.num_reference


@dataclass(frozen=True)
class ErrorRates:
    """Word, unit and character error rates of a test set.

    Attributes:
        words, units, characters: the counts behind the rates.
        wer_interval: see `bootstrap_interval`, of the word error rate, percent.
        num_utterances: utterances scored.
        num_wrong: utterances with at least one wrong word.
    """

    words: EditCounts
    units: EditCounts
    characters: EditCounts
    num_utterances: int
    num_wrong: int
    wer_interval: tuple[float, float]

    @property
    def wer(self) -> float:
        """Word error rate, percent."""
        return self.words.error_rate

    @property
    def uer(self) -> float:
        """Unit (letter) error rate, percent."""
        return self.units.error_rate

    @property
    def cer(self) -> float:
        """Character error rate, percent; the space between words is a character."""
        return self.characters.error_rate

    def to_dict(self) -> dict[str, Any]:
        """Rates in percent and counts, for JSON."""
        return {
            "wer": self.wer,
            "uer": self.uer,
            "cer": self.cer,
            "wer_interval": list(self.wer_interval),
            "num_utterances": self.num_utterances,
            "num_wrong_utterances": self.num_wrong,
            "word": {**asdict(self.words), "errors": self.words.errors},
            "unit": {**asdict(self.units), "errors": self.units.errors},
            "character": {**asdict(self.characters), "errors": self.characters.errors},
        }

    def __str__(self) -> str:
        return (
            f"WER {self.wer:.2f}% ({self.words.errors} errors in {self.words.num_reference} words: {self.words.substitutions} "
            f"substituted, {self.words.deletions} deleted, {self.words.insertions} inserted), UER {self.uer:.2f}% "
            f"({self.units.errors} errors in {self.units.num_reference} units), CER {self.cer:.2f}%, {self.num_wrong} of "
            f"{self.num_utterances} utterances with an error, WER in [{self.wer_interval[0]:.2f}, {self.wer_interval[1]:.2f}] with "
            f"{CONFIDENCE:.0%} confidence"
        )


def error_rates(
    references: Sequence[str],
    hypotheses: Sequence[str],
    reference_units: Sequence[str] | None = None,
    hypothesis_units: Sequence[str] | None = None,
) -> ErrorRates:
    """Compares transcripts: rate = 100 (substitutions + deletions + insertions) / reference items, over all utterances.

    Args:
        references: what was said, words with spaces between them.
        hypotheses: what was decoded, in the same order.
        reference_units, hypothesis_units: units (letters, ...) with spaces between them; without them the letters of the
            words are taken, with ``|`` between words.
    Raises:
        ValueError: the counts differ, there is nothing to compare, or all references are empty.
    """
    if (reference_units is None) != (hypothesis_units is None):
        raise ValueError("`reference_units` and `hypothesis_units` must be given together, or neither")
    said, heard = [_letters(text) for text in references], [_letters(text) for text in hypotheses]
    words, errors, lengths = _align(references, hypotheses, "words")
    units, _, _ = _align(
        said if reference_units is None else reference_units,
        heard if hypothesis_units is None else hypothesis_units,
        "units",
    )
    if reference_units is not None and len(reference_units) != len(references):
        raise ValueError(
            f"`reference_units` must have a line for each of the {len(references)} references, but has {len(reference_units)}"
        )
    characters, _, _ = _align(said, heard, "characters")
    num_wrong = sum(r.split() != h.split() for r, h in zip(references, hypotheses, strict=True))
    return ErrorRates(words, units, characters, len(references), num_wrong, bootstrap_interval(errors, lengths))


def bootstrap_interval(
    errors: Sequence[int],
    lengths: Sequence[int],
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of an error rate, percent, by resampling utterances with replacement  (Bisani & Ney, 2004, eq. 3).

        W_b = 100 sum_i errors_{b_i} / sum_i lengths_{b_i},   b_1 ... b_s drawn from the s utterances;
        the interval lies between the (1 - confidence) / 2 and (1 + confidence) / 2 quantiles of the W_b

    Args:
        errors, lengths: errors and reference items of each utterance.
        confidence: in (0, 1).
        num_resamples: B, how often is drawn.
        seed: the same seed gives the same interval.
    Raises:
        ValueError: there is nothing to draw from, or an argument is out of range.
    """
    if len(errors) != len(lengths) or sum(lengths) < 1:
        raise ValueError(
            f"an interval needs errors and lengths of the same utterances with something said, but there are {len(errors)} and "
            f"{len(lengths)}, {sum(lengths)} items in all"
        )
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"`confidence` must be in (0, 1) and `num_resamples` at least 1, but are {confidence} and {num_resamples}"
        )
    generator, rates = np.random.default_rng(seed), []
    counts = np.array([errors, lengths], dtype=np.float64)  # [2, s]
    for first in range(0, num_resamples, RESAMPLES_AT_ONCE):
        num_drawn = min(RESAMPLES_AT_ONCE, num_resamples - first)
        drawn = counts[:, generator.integers(len(errors), size=(num_drawn, len(errors)))].sum(-1)  # [2, b]
        # a draw of silent utterances only, in a tiny set, has no rate
        rates.append(100.0 * drawn[0, drawn[1] > 0] / drawn[1, drawn[1] > 0])
    low, high = np.quantile(np.concatenate(rates), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _letters(words: str) -> str:
    return " ".join("|".join(words.split()))


def _align(references: Sequence[str], hypotheses: Sequence[str], what: str) -> tuple[EditCounts, list[int], list[int]]:
    """Counts over all utterances; errors and reference items of each."""
    if len(references) != len(hypotheses):
        raise ValueError(
            f"references and hypotheses must be of the same utterances, but there are {len(references)} references and "
            f"{len(hypotheses)} hypotheses ({what})"
        )
    lengths = [len(r.split()) for r in references]
    num_reference = sum(lengths)
    if num_reference == 0:
        raise ValueError(
            f"an error rate needs references with at least one of their {what}, but all {len(references)} are empty; check the "
            "label file"
        )
    try:
        from jiwer import process_words
    except ImportError as error:
        raise RuntimeError("error rates need jiwer, which is not installed; run: pip install jiwer") from error
    counts = process_words(list(references), list(hypotheses))
    errors = [
        # a chunk covers more hypothesis than reference items where something was inserted
        sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
        for chunks in counts.alignments
    ]
    total = EditCounts(counts.substitutions, counts.deletions, counts.insertions, num_reference)
    assert sum(errors) == total.errors
    return total, errors, lengths
