"""Error rates of transcripts: words and units, counted by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


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
    """Word and unit error rates of a test set.

    Attributes:
        words, units: the counts behind the rates.
        num_utterances: utterances scored.
        num_wrong: utterances with at least one wrong word.
    """

    words: EditCounts
    units: EditCounts
    num_utterances: int
    num_wrong: int

    @property
    def wer(self) -> float:
        """Word error rate, percent."""
        return self.words.error_rate

    @property
    def uer(self) -> float:
        """Unit (letter) error rate, percent."""
        return self.units.error_rate

    def to_dict(self) -> dict[str, Any]:
        """Rates in percent and counts, for JSON."""
        return {
            "wer": self.wer,
            "uer": self.uer,
            "num_utterances": self.num_utterances,
            "num_wrong_utterances": self.num_wrong,
            "word": {**asdict(self.words), "errors": self.words.errors},
            "unit": {**asdict(self.units), "errors": self.units.errors},
        }

    def __str__(self) -> str:
        return (
            f"WER {self.wer:.2f}% ({self.words.errors} errors in {self.words.num_reference} words: {self.words.substitutions} "
            f"substituted, {self.words.deletions} deleted, {self.words.insertions} inserted), UER {self.uer:.2f}% "
            f"({self.units.errors} errors in {self.units.num_reference} units), {self.num_wrong} of {self.num_utterances} "
            "utterances with an error"
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
    words = _align(references, hypotheses, "words")
    units = _align(
        [_letters(r) for r in references] if reference_units is None else reference_units,
        [_letters(h) for h in hypotheses] if hypothesis_units is None else hypothesis_units,
        "units",
    )
    if reference_units is not None and len(reference_units) != len(references):
        raise ValueError(
            f"`reference_units` must have a line for each of the {len(references)} references, but has {len(reference_units)}"
        )
    num_wrong = sum(r.split() != h.split() for r, h in zip(references, hypotheses, strict=True))
    return ErrorRates(words, units, len(references), num_wrong)


def _letters(words: str) -> str:
    return " ".join("|".join(words.split()))


def _align(references: Sequence[str], hypotheses: Sequence[str], what: str) -> EditCounts:
    if len(references) != len(hypotheses):
        raise ValueError(
            f"references and hypotheses must be of the same utterances, but there are {len(references)} references and "
            f"{len(hypotheses)} hypotheses ({what})"
        )
    num_reference = sum(len(r.split()) for r in references)
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
    return EditCounts(counts.substitutions, counts.deletions, counts.insertions, num_reference)
