"""The languages of the demo corpora: their words, and how espeak-ng says them."""

import collections
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from s3distill.data import espeak_worker
from s3distill.data.demo_languages import LANGUAGES, check_languages
from s3distill.data.espeak import synthesise
from s3distill.data.transcripts import normalise

espeakng_loader = pytest.importorskip("espeakng_loader")
OTHERS = [language for language in LANGUAGES if language != "en"]

# In a process of its own: the library keeps its voice in static variables. The worker's file alone needs no torch
PHONEMES = """
import ctypes, json, runpy, sys
library, _ = runpy.run_path(sys.argv[1])["initialise"](*sys.argv[2:])
library.espeak_TextToPhonemes.restype = ctypes.c_char_p
def phonemes(voice, word):
    assert library.espeak_SetVoiceByName(voice.encode()) == 0, voice
    text = ctypes.create_string_buffer(word.encode())
    return library.espeak_TextToPhonemes(ctypes.byref(ctypes.c_void_p(ctypes.addressof(text))), 1, 2).decode()
print(json.dumps([phonemes(*pair) for pair in json.load(sys.stdin)]))
"""


def phonemes(pairs: list[tuple[str, str]]) -> list[str]:
    """What espeak-ng's voice makes of each word, in IPA."""
    arguments = [espeak_worker.__file__, espeakng_loader.get_library_path(), espeakng_loader.get_data_path()]
    command = [sys.executable, "-c", PHONEMES, *arguments]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def edit_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        row, last = [i], row
        for j, b in enumerate(second, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
    return row[-1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_are_upper_case_composed_letters_and_none_has_a_doubled_one(language):
    grammar = LANGUAGES[language].grammar
    words = grammar.vocabulary
    assert [len(getattr(grammar, slot)) for slot in ("action", "number", "colour", "thing", "place")] == [5, 5, 5, 7, 5]
    assert len(set(words)) == 27
    assert all(normalise(word) == word and word.isalpha() and word.isupper() for word in words)
    assert not [word for word in words if any(a == b for a, b in itertools.pairwise(word))]


def test_no_word_is_in_two_languages():
    counts = collections.Counter(word for language in LANGUAGES.values() for word in language.grammar.vocabulary)
    assert max(counts.values()) == 1


def test_word_order_of_a_colour():
    for language, entry in LANGUAGES.items():
        order = entry.grammar.order
        assert (order.index("colour") > order.index("thing")) == (language in ("es", "fr", "it"))
        assert sorted(order) == ["action", "colour", "number", "place", "thing"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_a_language_are_far_from_each_other_in_sound(language):
    words = LANGUAGES[language].grammar.vocabulary
    for accent in LANGUAGES[language].accents:
        voice = "en" if accent == "en-gb" else accent
        sounds = [re.sub("[ˈˌː]", "", sound) for sound in phonemes([(voice, word.lower()) for word in words])]
        near = [
            (words[i], words[j])
            for i, j in itertools.combinations(range(len(words)), 2)
            if edit_distance(sounds[i], sounds[j]) < max(2, 0.4 * max(len(sounds[i]), len(sounds[j])))
        ]
        assert near == []


@pytest.mark.parametrize("language", OTHERS)
def test_each_word_is_said_in_its_own_language(language):
    words = [word.lower() for word in LANGUAGES[language].grammar.vocabulary]
    english = phonemes([("en-us", word) for word in words])
    for accent in LANGUAGES[language].accents:
        own = phonemes([(accent, word) for word in words])
        assert not [sound for sound in own if "(" in sound]  # a switch of language: espeak-ng took it for English
        assert not [word for word, a, b in zip(words, own, english, strict=True) if a == b]


@pytest.mark.parametrize("language", OTHERS)
def test_a_word_sounds_other_than_in_english_and_lasts_as_long_as_a_word(language):
    for word in LANGUAGES[language].grammar.vocabulary[:5]:
        own, rate = synthesise(word.lower(), f"{LANGUAGES[language].accents[0]}+m1")
        english, _ = synthesise(word.lower(), "en-us+m1")
        assert 0.15 < len(own) / rate < 1.5
        assert len(own) != len(english) or not np.array_equal(own, english)


@pytest.mark.parametrize(
    ("languages", "fault"),
    [
        (["en", "xx", "tlh"], r"is 'en,xx,tlh' \(unknown: 'tlh', 'xx'\)"),
        (["NL"], r"is 'NL' \(unknown: 'NL'\)"),
        (["nl", "nl"], r"is 'nl,nl' \(one stands twice\)"),
        ([""], r"is '' \(unknown: ''\)"),
        ([], r"is '' \(it names none\)"),
    ],
)
def test_bad_languages(languages, fault):
    with pytest.raises(
        ValueError, match=rf"^`languages` must be some of en, nl, de, es, fr, it, but {fault}; pass en,nl"
    ):
        check_languages(languages)
