"""A recogniser's units in the symbols of a dictionary, and as words."""

from __future__ import annotations

import pytest

from s3distill.data.label_text import LabelText, spelled_symbols

LETTERS = LabelText(["|", "A", "B", "É"])


@pytest.mark.parametrize(
    ("units", "line"),
    [
        ("A B |", "A B |"),
        ("A B", "A B |"),  # the boundary behind the last word is added
        ("| | A | | B |", "A | B |"),
        ("a b", "A B |"),  # the dictionary's case
        ("e\u0301", "É |"),  # composed
        ("<s> A <pad> </s>", "A |"),
        ("", ""),
        ("|", ""),
    ],
)
def test_units_become_a_label_line(units: str, line: str) -> None:
    assert LETTERS.normalise(units.split()) == line.split()


@pytest.mark.parametrize("units", ["A C", "A <unk>", "madeupword0000"])
def test_what_the_dictionary_lacks_cannot_be_written(units: str) -> None:
    assert LETTERS.normalise(units.split()) is None


def test_words() -> None:
    assert LETTERS.words(["A", "B", "|", "É", "|"]) == "AB É" and LETTERS.has_words
    pieces = LabelText(["▁HEL", "LO", "▁"])
    assert pieces.words(["▁HEL", "LO", "▁", "LO"]) == "HELLO LO" and pieces.has_words
    assert pieces.normalise(["▁hel", "LO"]) == ["▁HEL", "LO"]
    phones = LabelText(["ə", "t"])
    assert phones.words(["ə", "t"]) == "ə t" and not phones.has_words


def test_special_symbols_spell_nothing() -> None:
    assert spelled_symbols(["<s>", "<pad>", "</s>", "<unk>", "|", "A", "madeupword0001"]) == ["|", "A"]
