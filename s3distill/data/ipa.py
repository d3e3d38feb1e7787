# ruff: noqa: RUF001
"""Sounds in IPA, out of espeak-ng's names of its phonemes, such that tables of different authors can be compared."""

from __future__ import annotations

import unicodedata

_VOWELS = frozenset("aeiouyæøœɐɑɒɔəɘɛɜɞɤɨɪɯɵɶʉʊʌʏᵻɚɝ")
_STOPS = frozenset("pbtdʈɖcɟkɡgqɢ")
_FRICATIVES = frozenset("ɸβfvθðszʃʒʂʐɕʑçʝxɣχʁ")
_NO_DIACRITICS = "ːˑˈˌ"  # length and stress

# Where a phoneme has no name in IPA, letters of its mnemonic come through (Kyrgyz S, Irish A, Mandarin s.)
_MNEMONICS = {"r.": "ɽ", "s.": "ʂ", "z.": "ʐ", "S": "ʃ", "Z": "ʒ", "N": "ŋ", "X": "χ", "A": "ɑ", "?": "ʔ", "`": "ʼ"}
_SPELLINGS = {"Φ": "ɸ", "ε": "ɛ", "ʦ": "ts", "\u0361": ""}  # other ways to write a sound; a tie is implied


def split_sounds(phoneme: str) -> list[str]:
    """The sounds in espeak-ng's name of a phoneme: ``tʃː`` -> tʃ, ``ɔːɹ`` -> ɔ, ɹ, ``ˈaɪ`` -> aɪ.

    A letter keeps its diacritics (ɑ̃, tʲ). Neighbours make one sound where they are vowels (a diphthong) or a stop with a
    fricative (an affricate), and h behind a stop is its aspiration. Length goes, of vowels and consonants: some tables mark
    it and some do not, for nearly the same vowel (English iː, French i), and where it tells words apart the letters differ
    too in most of them (iː, ɪ). Stress, tones and what espeak-ng writes to tell variants apart are no sounds.
    """
    for name, ipa in (_MNEMONICS | _SPELLINGS).items():
        phoneme = phoneme.replace(name, ipa)
    sounds: list[str] = []
    for character in unicodedata.normalize("NFD", phoneme):
        category = unicodedata.category(character)
        if category in ("Mn", "Lm") and character not in _NO_DIACRITICS:
            if sounds:
                sounds[-1] += character
        elif character == "h" and sounds and sounds[-1][0] in _STOPS:
            sounds[-1] += "ʰ"
        elif category in ("Ll", "Lo"):
            if sounds and _make_one(sounds[-1], character):
                sounds[-1] += character
            elif not sounds or sounds[-1] != character:  # aa, ss: long ones
                sounds.append(character)
    return [unicodedata.normalize("NFC", sound) for sound in sounds]


def _make_one(sound: str, letter: str) -> bool:
    if letter in _VOWELS:
        return sound[0] in _VOWELS and sound != letter
    return sound in _STOPS and letter in _FRICATIVES
