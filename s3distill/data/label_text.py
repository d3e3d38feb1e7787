"""What a recogniser wrote, in the symbols of a target dictionary, and as words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from s3distill.data.transcripts import WORD_BOUNDARY

WORD_START = "▁"  # of sentencepiece units
SILENT_SYMBOLS = ("<s>", "<pad>", "</s>")  # specials that spell nothing
_FILLERS = ("<unk>", "madeupword")  # specials that stand for something, and nobody knows for what


def spelled_symbols(symbols: Iterable[str]) -> list[str]:
    """The symbols of a model's output that spell something, in their order: fairseq's special ones left out."""
    return [s for s in symbols if s not in SILENT_SYMBOLS and not s.startswith(_FILLERS)]


class LabelText:
    """Units of one dictionary.

    A symbol that the dictionary lacks is taken in the dictionary's case, or as composed or decomposed Unicode, where it has
    that. Of letters (``|``) word boundaries at the start and twice in a row are dropped, and one ends the line, as `.ltr` has it.

    Args:
        symbols: the dictionary without fairseq's special symbols.
    """

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        self._known = frozenset(symbols)
        self.has_boundary = WORD_BOUNDARY in self._known
        self.has_words = self.has_boundary or any(s.startswith(WORD_START) for s in symbols)

    def symbol(self, unit: str) -> str | None:
        """The dictionary's symbol for a unit, or None where it has none."""
        forms = (unit, unit.upper(), unit.lower())
        forms += tuple(unicodedata.normalize(kind, form) for kind in ("NFC", "NFD") for form in forms)
        return next((form for form in forms if form in self._known), None)

    def normalise(self, units: Iterable[str]) -> list[str] | None:
        """Units as a label line of the dictionary has them, or None where one cannot be written in it."""
        written = [self.symbol(unit) for unit in units if unit not in SILENT_SYMBOLS]
        line: list[str] = []
        for symbol in written:
            if symbol is None:
                return None
            if symbol != WORD_BOUNDARY or (line and line[-1] != WORD_BOUNDARY):
                line.append(symbol)
        if self.has_boundary and line and line[-1] != WORD_BOUNDARY:
            line.append(WORD_BOUNDARY)
        return line

    def words(self, units: Iterable[str]) -> str:
        """Units joined to words; units without word boundaries (phones) stay apart."""
        if self.has_boundary:
            return " ".join("".join(units).replace(WORD_BOUNDARY, " ").split())
        if self.has_words:
            return " ".join("".join(units).replace(WORD_START, " ").split())
        return " ".join(units)
