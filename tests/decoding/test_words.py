"""Words of symbol sequences, for letters, pieces and units."""

import torch

from s3distill.decoding.ctc import CtcHypothesis
from s3distill.decoding.words import part_of, split_words, word_boundary


def words(text: str, boundary: str) -> list[tuple[str, int, int]]:
    return [(word, part.start, part.stop) for word, part in split_words(text.split(), boundary)]


def test_the_dictionary_says_how_symbols_make_words() -> None:
    assert word_boundary(["<s>", "A", "|"]) == "|"
    assert word_boundary(["<s>", "▁HE", "LLO"]) == "▁"
    assert word_boundary(["<s>", "aa", "b"]) == ""


def test_letters_end_at_their_sign() -> None:
    assert words("H I | A |", "|") == [("HI", 0, 2), ("A", 3, 4)]
    assert words("| H I | | A", "|") == [("HI", 1, 3), ("A", 5, 6)]
    assert words("", "|") == [] and words("|", "|") == []


def test_pieces_begin_at_theirs() -> None:
    assert words("▁HE LLO ▁ YOU ▁A", "▁") == [("HELLO", 0, 2), ("YOU", 2, 4), ("A", 4, 5)]
    assert words("LLO ▁A", "▁") == [("LLO", 0, 1), ("A", 1, 2)], "a word may lack its first piece"


def test_other_symbols_are_words_of_their_own() -> None:
    assert words("aa b |", "") == [("aa", 0, 1), ("b", 1, 2), ("|", 2, 3)]


def test_a_part_keeps_its_places_and_scores() -> None:
    whole = CtcHypothesis(
        torch.tensor([4, 5, 6]),
        -9.0,
        torch.tensor([-1.0, -2.0, -4.0]),
        torch.tensor([0, 3, 7]),
        torch.tensor([1, 5, 9]),
    )
    part = part_of(whole, [1, 2])
    assert (part.tokens.tolist(), part.timesteps.tolist(), part.ends.tolist()) == ([5, 6], [3, 7], [5, 9])
    assert part.score == -6.0
