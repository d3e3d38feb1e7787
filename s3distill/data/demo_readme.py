"""The README.txt of the demo corpora, all of its text in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from s3distill.data.demo_languages import LANGUAGES

Rows = Mapping[str, Mapping[str, float]]

TITLE = "Demo speech of s3distill"

CORPUS = """\
{title}
{rule}
This speech is SYNTHETIC. The espeak-ng synthesiser spoke it from a grammar of {num_words} words, to try the chain on
and to test it. Error rates on it say nothing about real speech.

16 kHz mono FLAC; NAME.tsv lists the audio of a split (line 1: the root, `.` is this folder), NAME.wrd and NAME.ltr hold
its words and letters line by line, dict.ltr.txt the letters of train with their counts, demo.json the settings.
No sentence and no voice of valid or test is in train.

{table}
"""

MULTILINGUAL = """\
{title}
{rule}
This speech is SYNTHETIC. The espeak-ng synthesiser spoke it in {num_languages} languages, each with a small grammar of its own,
to try the chain on and to test it. Error rates on it say nothing about real speech.

{folders}
    all: all of them together

Each folder holds manifests (NAME.tsv), words (NAME.wrd) and letters (NAME.ltr) of train, valid and test. The audio
(16 kHz mono FLAC) is in the folders of the languages: the manifests of all/ have the root `..`, so that an entry
begins with its language (nl/train/...), and the folders move together. dict.ltr.txt of a language holds its own
letters only, for an output layer of its own; that of all/ holds the letters of all languages, for a shared one: the
same letter has another index there.
No sentence of valid or test, and no voice variant, is in train, whatever the language; no word is in two languages.

{table}
"""


def corpus_readme(language: str, statistics: Rows) -> str:
    """README of one language's corpus; ``statistics`` has a row per split."""
    # English has been there from the start, and its corpus keeps its bytes
    title = TITLE if language == "en" else f"{TITLE}: {LANGUAGES[language].name}"
    num_words = len(LANGUAGES[language].grammar.vocabulary)
    return CORPUS.format(title=title, rule="=" * len(title), num_words=num_words, table=_table(statistics))


def multilingual_readme(languages: Sequence[str], statistics: Mapping[str, Rows]) -> str:
    """README of a multilingual corpus; ``statistics`` has a row per folder and split."""
    title = f"{TITLE}, multilingual"
    folders = "\n".join(f"    {language}:  {LANGUAGES[language].name}" for language in languages)
    rows = {f"{folder} {split}": row for folder, splits in statistics.items() for split, row in splits.items()}
    return MULTILINGUAL.format(
        title=title, rule="=" * len(title), num_languages=len(languages), folders=folders, table=_table(rows)
    )


def _table(rows: Rows) -> str:
    width = max(8, 1 + max(map(len, rows)))
    names = next(iter(rows.values()))
    lines = [" " * width + "".join(f"{name:>12}" for name in names)]
    lines += [f"{label:{width}}" + "".join(f"{value:12g}" for value in row.values()) for label, row in rows.items()]
    return "\n".join(lines)
