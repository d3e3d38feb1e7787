# ruff: noqa: RUF001
"""Phoneme inventories out of espeak-ng: its tables are read right, and what comes out is what textbooks say."""

import argparse
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from s3distill.cli import masks_inventory
from s3distill.data import phoneme_inventory
from s3distill.data.espeak_phonemes import SEPARATOR
from s3distill.data.ipa import split_sounds
from s3distill.data.phoneme_inventory import (
    MIN_SHARE,
    Inventory,
    build_inventories,
    compare_inventories,
    count_sounds,
)
from s3distill.data.phoneme_tables import PhonemeTable, TablePhoneme, Voice, read_phoneme_tables, read_voices
from s3distill.data.similarity_csv import read_similarity

LANGUAGES = ("en", "nl", "de", "fr", "es", "it")

# What is told of these languages in any textbook: sounds that they have, and sounds of the other five that they do not have
TEXTBOOK = {
    "en": (
        "p b t d k ɡ m n ŋ f v θ ð s z ʃ ʒ h tʃ dʒ l ɹ w j ɪ ɛ ʌ ʊ ə i u eɪ aɪ aʊ ɔɪ əʊ",
        "x ç y ø œ ɑ̃ ɲ ʎ r ʁ ɣ pf",
    ),
    "nl": ("p b t d k m n ŋ f v s z x ɣ h ʋ l r j ɑ ɛ ɪ ɔ ə a e i o u y ø ɛɪ œy ʌʊ", "θ ð ç ɑ̃ ʎ pf dʒ œ"),
    "de": ("p b t d k ɡ m n ŋ f v s z ʃ ç x h ts pf l j a ɛ ɪ ɔ ʊ ʏ œ ə e i o u y ø aɪ aʊ ɔø", "θ ð w ɲ ʎ ɑ̃ ɣ œy dʒ"),
    "fr": ("p b t d k ɡ m n ɲ f v s z ʃ ʒ ʁ l j w a e ɛ i o ɔ u y ø œ ə ɑ̃ ɛ̃ ɔ̃", "h x ŋ θ ð r tʃ ts ç aɪ"),
    "es": ("p b t d k ɡ m n ɲ f θ s x tʃ l ʎ ɾ r j w a e i o u", "z v ʃ h y ø ə œ ɑ̃ ts"),
    "it": ("p b t d k ɡ m n ɲ f v s z ʃ ts dz tʃ dʒ l ʎ r j w a e ɛ i o ɔ u", "h x θ ð y ø ə œ ɑ̃ ʒ"),
}


@pytest.fixture(scope="module")
def inventories() -> dict[str, Inventory]:
    pytest.importorskip("espeakng_loader")
    return build_inventories({name: name for name in LANGUAGES})


@pytest.fixture(scope="module")
def data_path() -> Path:
    return Path(pytest.importorskip("espeakng_loader").get_data_path())


@pytest.mark.parametrize("language", LANGUAGES)
def test_inventory_is_what_textbooks_say(inventories: dict[str, Inventory], language: str) -> None:
    sounds = inventories[language].sounds
    has, has_not = (text.split() for text in TEXTBOOK[language])
    assert [sound for sound in has if sound not in sounds] == []
    assert [sound for sound in has_not if sound in sounds] == []
    assert len(sounds) <= len(has) + 12


def test_related_languages_are_more_alike(inventories: dict[str, Inventory]) -> None:
    matrix = compare_inventories(inventories)
    assert matrix.names == LANGUAGES
    values = {(a, b): matrix.values[i, j] for i, a in enumerate(LANGUAGES) for j, b in enumerate(LANGUAGES) if i < j}
    assert sorted(values, key=values.get)[-2:] == [("es", "it"), ("nl", "de")]
    assert all(0.3 < value < 0.7 for value in values.values())
    np.testing.assert_array_equal(matrix.values, matrix.values.T)
    sets = {name: set(inventories[name].sounds) for name in ("fr", "es")}
    assert values["fr", "es"] == len(sets["fr"] & sets["es"]) / len(sets["fr"] | sets["es"])


def test_rare_sounds_are_left_out_and_told(inventories: dict[str, Inventory]) -> None:
    german = inventories["de"]
    total = sum(german.sounds.values()) + sum(german.rare.values())
    assert "ʒ" in german.rare and german.num_words > 1000
    assert min(german.sounds.values()) >= MIN_SHARE * total > max(german.rare.values())
    assert list(german.sounds.values()) == sorted(german.sounds.values(), reverse=True)


def test_a_whole_table_is_no_inventory(inventories: dict[str, Inventory]) -> None:
    """Why what a language uses is looked up: its table inherits far more, and may add very little."""
    for inventory in inventories.values():
        assert inventory.num_own + inventory.num_inherited > 2 * len(inventory.sounds)
    assert inventories["es"].num_own < len(inventories["es"].sounds)


def test_names_stand_for_languages_of_espeak(inventories: dict[str, Inventory]) -> None:
    built = build_inventories({"british": "en-GB", "american": "en-us"})
    assert built["british"] == inventories["en"]
    assert (
        built["american"].voice == "en-US" and "æ" in built["american"].sounds and "ɒ" not in built["american"].sounds
    )


def test_own_words_are_spoken_instead(inventories: dict[str, Inventory]) -> None:
    words = [f"{a}{v}{b}a" for a in "bdfgklmnp" for v in "aeiou" for b in "lmnprst"]
    built = build_inventories(
        {"it": "it", "sw": "sw"}, {"sw": words + [w + "li" for w in words] + [w + "ni" for w in words]}
    )
    assert built["it"] == inventories["it"]
    assert set("bdfklmnpt") <= built["sw"].sounds.keys() and "z" not in built["sw"].sounds


def test_a_crash_of_the_library_costs_one_text() -> None:
    loader = pytest.importorskip("espeakng_loader")
    voice, crashes = Voice("de", "de"), "\U0001f920"  # the dictionary's "Gesicht mit Cowboyhut", in espeak-ng 1.52
    spoken = phoneme_inventory._speak(
        voice, ["eins", crashes, crashes, "zwei", crashes], loader.get_library_path(), Path(loader.get_data_path())
    )
    assert [text for text in spoken if "ts" in text] == ["ts␟v␟ˈaɪ"] and spoken[0] == "␟ˈaɪ␟n␟s"


def test_sounds_of_distinct_words_are_counted() -> None:
    s = SEPARATOR
    spoken = [f"t{s}ˈa", f"t{s}ˈa m{s}aː{s}", f"(en)b{s}ˌɒ(de) k{s}a", "", f"n{s}a"]
    assert count_sounds(spoken) == (Counter({"a": 3, "t": 1, "m": 1, "n": 1}), 3)
    assert count_sounds([f"m{s}ˈaɜ{s}iɜ5{s}n"], has_tones=True)[0] == Counter({"m": 1, "a": 1, "i": 1, "n": 1})


@pytest.mark.parametrize(
    ("phoneme", "sounds"),
    [
        ("ˈaɪ", ["aɪ"]),
        ("aɪə", ["aɪə"]),
        ("iː", ["i"]),
        ("tʃː", ["tʃ"]),
        ("ss", ["s"]),
        ("aa", ["a"]),
        ("ɔːɹ", ["ɔ", "ɹ"]),
        ("əl", ["ə", "l"]),
        ("ja", ["j", "a"]),
        ("pf", ["pf"]),
        ("t͡ɕ", ["tɕ"]),
        ("tsh", ["tsʰ"]),
        ("ts.h", ["tʂʰ"]),
        ("ɑ̃", ["ɑ̃"]),
        ("ɐ̃ʊ̃", ["ɐ̃ʊ̃"]),
        ("tʲ", ["tʲ"]),
        ("ç", ["ç"]),
        ("e-", ["e"]),
        ("tS", ["tʃ"]),
        ("t[", ["t"]),
        ("i5", ["i"]),
        ("", []),
    ],
)
def test_names_of_phonemes_are_split_into_sounds(phoneme: str, sounds: list[str]) -> None:
    assert split_sounds(phoneme) == sounds


def table_bytes(name: str, included: int, phonemes: list[tuple[str, int, int]]) -> bytes:
    head = struct.pack("<BBxx32s", len(phonemes), included, name.encode())
    return head + b"".join(struct.pack("<4sIHBB4x", m.encode(), 0, 0, code, kind) for m, code, kind in phonemes)


def test_phoneme_tables_inherit_and_replace(tmp_path: Path) -> None:
    base = [("'", 6, 1), ("p", 40, 4), ("a", 41, 2), ("m", 42, 8)]
    tables = [
        table_bytes("base", 0, base),
        table_bytes("mid", 1, [("a:", 41, 2), ("55", 50, 1)]),
        table_bytes("xx", 2, [("b", 43, 5)]),
    ]
    (tmp_path / "phontab").write_bytes(bytes([3, 0, 0, 0]) + b"".join(tables))
    read = read_phoneme_tables(tmp_path)
    p, m = TablePhoneme("p", "stop"), TablePhoneme("m", "nasal")
    assert read["base"] == PhonemeTable("base", (p, TablePhoneme("a", "vowel"), m), (), False)
    assert read["mid"] == PhonemeTable("mid", (TablePhoneme("a:", "vowel"),), (p, m), True)
    own, inherited = read["xx"].own, set(read["xx"].inherited)
    assert own == (TablePhoneme("b", "voiced stop"),) and inherited == {p, m, TablePhoneme("a:", "vowel")}
    whole = (tmp_path / "phontab").read_bytes()
    for damaged, fault in (
        (whole[:-1], "unpack_from"),
        (whole + b"0000", "its tables end at byte"),
        (b"", "index out of range"),
    ):
        (tmp_path / "phontab").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"phontab of espeak-ng must be a phoneme table file .*{fault}"):
            read_phoneme_tables(tmp_path)


def test_tables_of_the_library_are_read_whole(data_path: Path) -> None:
    tables, voices = read_phoneme_tables(data_path), read_voices(data_path)
    assert len(tables) > 100 and {"base1", *LANGUAGES} <= tables.keys() <= set(tables)
    mnemonics = {phoneme.mnemonic for phoneme in tables["base1"].own}
    assert {"T", "D", "S", "Z", "N", "x"} <= mnemonics  # Kirshenbaum's names of θ ð ʃ ʒ ŋ x
    assert {p.mnemonic: p.type for p in tables["de"].own}["y:"] == "vowel"
    assert {name for name in tables if tables[name].has_tones} >= {"cmn", "vi", "th"} and not tables["sv"].has_tones
    assert voices["en-gb"] == voices["en"] == Voice("en", "en") and voices["en-us"] == Voice("en-US", "en-us")
    assert voices["zh"] == Voice("cmn", "cmn")


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    masks_inventory.add_arguments(parser)
    return masks_inventory.run(parser.parse_args(list(map(str, argv))))


def test_command(tmp_path: Path, inventories: dict[str, Inventory], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words").mkdir()
    words = [f"{a}{v}{b}{e}" for a in "BDFKLMNP" for v in "AEIOU" for b in "KLMNPRST" for e in ("EN", "ER", "ELS")]
    (tmp_path / "words" / "nl.txt").write_text("\n".join(words))
    options = ["--words", tmp_path / "words", "-o", tmp_path / "out" / "similarity.csv"]
    assert run("--languages", "nl,fr , castellano=es", *options) == 0
    matrix = read_similarity(tmp_path / "out" / "similarity.csv")
    assert matrix.names == ("nl", "fr", "castellano") and np.diag(matrix.values).tolist() == [1, 1, 1]
    written = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert written["castellano"] == vars(inventories["es"]) and written["nl"]["sounds"] != inventories["nl"].sounds
    printed = capsys.readouterr().out
    assert "fr: 34 sounds in" in printed and "castellano" in printed and "1.00" in printed


def test_errors(tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "s.csv"
    with pytest.raises(
        ValueError, match="`languages` must be languages of espeak-ng, but xx-nowhere is not; there are af, "
    ):
        run("--languages", "en,xx-nowhere", "-o", output)
    with pytest.raises(ValueError, match="`languages` must name at least one language, but is empty; pass en,nl,de"):
        run("--languages", ",", "-o", output)
    with pytest.raises(
        ValueError, match="`--languages` must name each language once, but has 'nl' twice; leave one out"
    ):
        run("--languages", "nl,de,nl=fr", "-o", output)
    with pytest.raises(
        ValueError, match=r"words of at least 2000 sounds, but there are \d+ for 'zh': .* list zh.txt as --words"
    ):
        run("--languages", "zh", "-o", output)
    with pytest.raises(ValueError, match=r"must be a CSV file, but is .*s.json; the .json beside it holds"):
        run("--languages", "nl", "-o", tmp_path / "s.json")
    with pytest.raises(
        ValueError, match=r"must be a folder with a file such as nl.txt, but .* has none for nl, de; name the"
    ):
        run("--languages", "nl,de", "--words", tmp_path, "-o", output)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(
        RuntimeError, match=r"`espeakng-loader`, which is not installed; run: pip install 's3distill\[demo\]'"
    ):
        run("--languages", "nl", "-o", output)


def test_a_library_that_fails_is_told(data_path: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("espeakng_loader").get_library_path()
    with pytest.raises(
        RuntimeError, match=r"could not translate words of 'xx' \(OSError: .*returned.*'xx'\); install it again"
    ):
        phoneme_inventory._speak(Voice("xx", "xx"), ["a"], library, data_path)
