"""Phoneme inventories of languages out of espeak-ng, and how alike they are: what mask similarities are held against.

A phoneme table of espeak-ng is no inventory: it inherits the consonants of many languages (137 phonemes for English) and
what it adds itself may be a single one (Latin American Spanish). So an inventory is what the language uses when it
speaks: espeak-ng's dictionaries name 1200 emoji in 64 languages ("octopus", "Oktopus", "pulpo", "pieuvre"), a
parallel list of words that comes with the library; numbers are added. Sounds that make up less than `MIN_SHARE` of the
distinct words come from loanwords and are left out; over 12 languages, the similarities correlate at 0.96 and more with those
at four times that share, and with none left out.

Sounds are compared as IPA, made comparable across tables whose authors wrote them differently: see `split_sounds`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3distill.data import espeak_phonemes
from s3distill.data.espeak import INSTALL_HINT
from s3distill.data.ipa import split_sounds
from s3distill.data.manifest import write_lines
from s3distill.data.phoneme_tables import Voice, read_phoneme_tables, read_voices
from s3distill.data.similarity_csv import SimilarityMatrix

MIN_SOUNDS = 2000  # in distinct words; numbers alone give some 1000, which is too few to miss no phoneme
MIN_SHARE = 1 / 2000  # of the sounds; English "ð", rare in names of things, has 1 in 1000, German "ʒ" 1 in 3000
MIN_COUNT = 3

_EMOJI = ((0x2600, 0x27BF), (0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF))  # Unicode blocks
_NUMBERS = (*range(101), 200, 300, 1000, 1_000_000)


@dataclass(frozen=True)
class Inventory:
    """The sounds of a language.

    Attributes:
        voice: espeak-ng's name of the language.
        table: its phoneme table.
        num_own, num_inherited: phonemes of the table, and of those that it includes.
        num_words: distinct words that were spoken.
        sounds: sound in IPA -> how often it came, most frequent first.
        rare: the same of those that are left out.
    """

    voice: str
    table: str
    num_own: int
    num_inherited: int
    num_words: int
    sounds: dict[str, int]
    rare: dict[str, int]


def build_inventories(
    languages: Mapping[str, str], words: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Inventory]:
    """Builds the inventories of some languages.

    Args:
        languages: name -> espeak-ng's language, as in ``{"en": "en-us", "nl": "nl"}``.
        words: name -> texts in the language, spoken instead of emoji and numbers.
    Raises:
        ValueError: no language, an unknown one, or one of which too little was spoken.
        RuntimeError: the library is missing or fails.
    """
    if not languages:
        raise ValueError("`languages` must name at least one language, but is empty; pass en,nl,de")
    library_path, data_path = _library()
    voices, tables = read_voices(data_path), read_phoneme_tables(data_path)
    unknown = sorted(set(map(str.lower, languages.values())) - voices.keys())
    if unknown:
        raise ValueError(
            f"`languages` must be languages of espeak-ng, but {', '.join(unknown)} is not; there are {', '.join(sorted(voices))}"
        )
    inventories = {}
    for name, language in languages.items():
        voice = voices[language.lower()]
        spoken = _speak(voice, (words or {}).get(name, _parallel_words()), library_path, data_path)
        table = tables[voice.table]
        counts, num_words = count_sounds(spoken, table.has_tones)
        _check_enough(name, counts)
        kept = {sound for sound, count in counts.items() if count >= max(MIN_COUNT, MIN_SHARE * counts.total())}
        inventories[name] = Inventory(
            voice=voice.name,
            table=voice.table,
            num_own=len(table.own),
            num_inherited=len(table.inherited),
            num_words=num_words,
            sounds={sound: count for sound, count in counts.most_common() if sound in kept},
            rare={sound: count for sound, count in counts.most_common() if sound not in kept},
        )
    return inventories


def _library() -> tuple[str, Path]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise RuntimeError(
            "phoneme inventories need the espeak-ng library of the package `espeakng-loader`, which is not installed; "
            f"run: {INSTALL_HINT}"
        ) from error
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())


def _parallel_words() -> list[str]:
    return [chr(code) for first, last in _EMOJI for code in range(first, last + 1)] + [str(n) for n in _NUMBERS]


def _speak(voice: Voice, texts: Sequence[str], library_path: str, data_path: Path) -> list[str]:
    """The texts in phonemes, see `espeak_phonemes`; those that the library crashed on are left out."""
    with tempfile.TemporaryDirectory(prefix="espeak-") as folder:
        link = Path(folder, "espeak-ng-data")
        link.symlink_to(data_path)  # espeak-ng cuts a long data path
        command = [sys.executable, "-I", espeak_phonemes.__file__, library_path, os.fspath(link)]
        request = json.dumps({"voice": voice.name, "texts": list(texts)})
        done = subprocess.run(command, input=request, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        raise RuntimeError(
            f"espeak-ng could not translate words of {voice.name!r} ({(done.stderr.strip().splitlines() or ['no message'])[-1]}); "
            f"install it again: {INSTALL_HINT} --force-reinstall"
        )
    return [text for text in map(json.loads, done.stdout.splitlines()) if text is not None]


def count_sounds(spoken: Iterable[str], has_tones: bool = False) -> tuple[Counter[str], int]:
    """Counts the sounds of the distinct words in texts as `espeak_phonemes` gives them.

    A text in which espeak-ng changed to another language, as in ``(en)...(de)``, does not count.

    Args:
        has_tones: vowels end in the number of their tone, in which a leading 3 has become ``ɜ`` (no vowel of those languages).
    Returns:
        Sound -> its number; and the number of words.
    """
    words = {word for text in spoken if "(" not in text for word in text.split()}
    counts: Counter[str] = Counter()
    for word in words:
        for phoneme in word.split(espeak_phonemes.SEPARATOR):
            counts.update(split_sounds(phoneme.rstrip("ɜ0123456789") if has_tones else phoneme))
    return Counter(dict(sorted(counts.items()))), len(words)  # of equally frequent ones the first in the alphabet leads


def _check_enough(name: str, counts: Counter[str]) -> None:
    if counts.total() < MIN_SOUNDS:
        raise ValueError(
            f"an inventory needs words of at least {MIN_SOUNDS} sounds, but there are {counts.total()} for {name!r}: espeak-ng names no "
            f"emoji in this language, or the list is short; pass a folder with a longer list {name}.txt as --words"
        )


def compare_inventories(inventories: Mapping[str, Inventory]) -> SimilarityMatrix:
    """Jaccard similarity of the sets of sounds, |A and B| / |A or B|."""
    sets = [set(inventory.sounds) for inventory in inventories.values()]
    values = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    return SimilarityMatrix(tuple(inventories), values)


def write_inventories(path: str | os.PathLike[str], inventories: Mapping[str, Inventory]) -> None:
    """Writes the inventories as JSON, by name."""
    values = {name: vars(inventory) for name, inventory in inventories.items()}
    write_lines(path, [json.dumps(values, indent=1, ensure_ascii=False)])
