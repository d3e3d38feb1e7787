"""Words out of a hypothesis' symbols, and when they were said."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from s3distill.decoding.ctc import CtcHypothesis

LETTER_BOUNDARY = "|"  # ends a word of letters
PIECE_START = "\N{LOWER ONE EIGHTH BLOCK}"  # begins the first piece of a word, as sentencepiece writes it


@dataclass(frozen=True)
class TimedWord:
    """A word, when it begins and ends, and the mean posterior of its symbols over their frames."""

    word: str
    start_s: float
    end_s: float
    confidence: float


def word_boundary(symbols: Collection[str]) -> str:
    """How the symbols of a dictionary make words: ``|`` ends them, sentencepiece's sign begins them, or ``""``: each is one."""
    if LETTER_BOUNDARY in symbols:
        return LETTER_BOUNDARY
    return PIECE_START if any(symbol.startswith(PIECE_START) for symbol in symbols) else ""


def split_words(symbols: Sequence[str], boundary: str) -> Iterator[tuple[str, slice]]:
    """Words of a symbol sequence and where their symbols stand; ``|`` itself belongs to none.

    Args:
        symbols: what was decoded.
        boundary: see `word_boundary`.
    """
    begin = 0
    for position, symbol in enumerate([*symbols, None]):
        is_over = symbol is None or not boundary or symbol == boundary == LETTER_BOUNDARY
        begins = symbol is not None and boundary == PIECE_START and symbol.startswith(PIECE_START)
        if not (is_over or begins):
            continue
        if not boundary:
            if symbol is not None:
                yield symbol, slice(position, position + 1)
            continue
        text = "".join(symbols[begin:position]).removeprefix(PIECE_START)
        if text:
            yield text, slice(begin, position)
        begin = position if begins else position + 1


def part_of(hypothesis: CtcHypothesis, symbols: list[int]) -> CtcHypothesis:
    """Some symbols of a hypothesis, by their positions, as one of their own; its score is that of their frames."""
    scores = hypothesis.positional_scores[symbols]
    return CtcHypothesis(
        hypothesis.tokens[symbols], float(scores.sum()), scores, hypothesis.timesteps[symbols], hypothesis.ends[symbols]
    )
