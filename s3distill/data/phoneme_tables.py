"""espeak-ng's phoneme tables: which phonemes a language may use, read from the library's compiled data.

The file ``phontab`` (espeak-ng 1.52), in bytes:

    4                number of tables, 0, 0, 0
    per table
      4              number of phonemes, number of the included table (1 = the first one; 0 = none), 0, 0
      32             name, filled up with zeros
      16 a phoneme   mnemonic (4, filled up with zeros), flags (uint32), program (uint16), code, type, and four bytes on length and kind

All numbers are little-endian. A table holds what it adds to the table that it includes, or replaces there: phonemes with
the same code. Most languages include ``base1``, which has the consonants of many languages, so a whole table is far
larger than any language's inventory.

Which table a language has stands in its voice file ``lang/FAMILY/LANGUAGE``: the attribute ``phonemes``, else the first
part of its first ``language``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TABLE = struct.Struct("<BBxx32s")
_PHONEME = struct.Struct("<4sIHBB4x")
_STRESS_OR_TONE = 1  # a type; tones are named by digits
_SOUNDS = {2: "vowel", 3: "liquid", 4: "stop", 5: "voiced stop", 6: "fricative", 7: "voiced fricative", 8: "nasal"}


@dataclass(frozen=True)
class TablePhoneme:
    """A phoneme that can be heard: espeak-ng's mnemonic, and its type, such as ``nasal`` (or ``tone``)."""

    mnemonic: str
    type: str


@dataclass(frozen=True)
class PhonemeTable:
    """A table with all that it includes.

    Attributes:
        name: of the table.
        own: phonemes that stand in the table itself; stress marks, pauses and rules are left out.
        inherited: those of the tables that it includes, where it does not replace them.
        has_tones: whether there are tones among them; they do not count in the two above.
    """

    name: str
    own: tuple[TablePhoneme, ...]
    inherited: tuple[TablePhoneme, ...]
    has_tones: bool


@dataclass(frozen=True)
class Voice:
    """A language of espeak-ng: the name that the library finds it by, and its phoneme table."""

    name: str
    table: str


def read_phoneme_tables(data_path: Path) -> dict[str, PhonemeTable]:
    """All tables by name.

    Raises:
        ValueError: ``phontab`` does not have the format above.
    """
    raw = _read_raw(data_path / "phontab")
    tables = {}
    for name, included, own in raw:
        inherited: dict[int, TablePhoneme | None] = {}
        while included:
            _, next_included, phonemes = raw[included - 1]
            inherited = phonemes | inherited
            included = next_included
        rest = {code: phoneme for code, phoneme in inherited.items() if code not in own}
        has_tones = any(p and p.type == "tone" for p in (*own.values(), *rest.values()))
        tables[name] = PhonemeTable(name, _sounds(own), _sounds(rest), has_tones)
    return tables


def _sounds(phonemes: Mapping[int, TablePhoneme | None]) -> tuple[TablePhoneme, ...]:
    return tuple(p for p in phonemes.values() if p and p.type != "tone")


def _read_raw(path: Path) -> list[tuple[str, int, dict[int, TablePhoneme | None]]]:
    """Per table its name, the number of the table it includes, and its phonemes by code (None = cannot be heard)."""
    data = path.read_bytes()
    raw, position = [], 4
    try:
        for _ in range(data[0]):
            num_phonemes, included, name = _TABLE.unpack_from(data, position)
            position += _TABLE.size
            phonemes: dict[int, TablePhoneme | None] = {}
            for _ in range(num_phonemes):
                mnemonic, _, _, code, kind = _PHONEME.unpack_from(data, position)
                position += _PHONEME.size
                text = mnemonic.rstrip(b"\0").decode("latin-1")
                type_name = "tone" if kind == _STRESS_OR_TONE and text[:1].isdigit() else _SOUNDS.get(kind)
                phonemes[code] = TablePhoneme(text, type_name) if type_name else None
            if not 0 <= included <= len(raw):
                raise ValueError(f"table {len(raw) + 1} includes table {included}")
            raw.append((name.rstrip(b"\0").decode("ascii"), included, phonemes))
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(_unknown_format(path, str(error))) from error
    if position != len(data):
        raise ValueError(_unknown_format(path, f"its tables end at byte {position} of {len(data)}"))
    return raw


def _unknown_format(path: Path, fault: str) -> str:
    return (
        f"{path.name} of espeak-ng must be a phoneme table file of version 1.52, but is not ({fault}); install the version that "
        "the package espeakng-loader 0.2 brings"
    )


def read_voices(data_path: Path) -> dict[str, Voice]:
    """The languages by the name of their voice file and by their language codes, in lower case; files go first."""
    by_file, by_code = {}, {}
    for path in sorted((data_path / "lang").rglob("*")):
        if not path.is_file():
            continue
        attributes = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        codes = [words[1].lower() for words in attributes if words[:1] == ["language"] and len(words) > 1]
        named = [words[1] for words in attributes if words[:1] == ["phonemes"] and len(words) > 1]
        if not codes:
            continue
        voice = Voice(path.name, named[0] if named else codes[0].split("-")[0])
        by_file[path.name.lower()] = voice
        for code in codes:
            by_code.setdefault(code, voice)
    return by_code | by_file
