"""Transcripts: found beside the audio, normalised, and spelled as the label lines that fairseq reads."""

from __future__ import annotations

import collections
import csv
import functools
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

WORD_BOUNDARY = "|"
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u00b4`"), "'")
_SPOKEN_PUNCTUATION = "&%@#"
_AUDIO_COLUMNS = ("file_name", "file", "path", "audio", "id")
_TEXT_COLUMNS = ("transcription", "transcript", "sentence", "text")


def normalise(text: str) -> str:
    """Upper-case words of letters and apostrophes with one space between.

    Letters of every script stay, with their accents (NFC). Typographic apostrophes become ``'``; hyphens and other
    punctuation become spaces; apostrophes at the edge of a word are dropped, as they are most often quotes. A text
    that is upper-case letters, apostrophes and spaces already (LibriSpeech) keeps those.

    Raises:
        ValueError: a digit or a symbol that is spoken (``&``, ``%``, ``$`` ...): there is no telling how, and dropping
            it would train wrong labels.
    """
    upper = unicodedata.normalize("NFC", text.upper()).translate(_APOSTROPHES)
    if text == text.upper() and all(_is_letter(c) or c in "' " for c in upper):
        return " ".join(upper.split())
    for character in text:
        if character in _SPOKEN_PUNCTUATION or _is_symbol(character):
            raise ValueError(
                f"a transcript must be spelled out in letters, but has {character!r} in {text!r}; write it as words"
            )
    kept = (c if _is_letter(c) or c == "'" else " " for c in upper)
    words = (word.strip("'") for word in "".join(kept).split())
    return " ".join(word for word in words if word)


def _is_symbol(character: str) -> bool:
    return unicodedata.category(character)[0] in "NS" and ord(character) not in _APOSTROPHES


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"  # M: accents that have no composed letter


def spell(words: str) -> str:
    """The `.ltr` line of a `.wrd` line: spaced letters, ``|`` behind each word ("AS IT" -> "A S | I T |")."""
    return " ".join(" ".join([*word, WORD_BOUNDARY]) for word in words.split())


def find_transcripts(audio_paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """Raw transcripts of audio files, from what lies beside them; files without one are left out.

    Looked for, in this order:
        ``<name>.txt`` beside the audio: all of it is the transcript.
        ``*.trans.txt`` in the folder of the audio (LibriSpeech): ``name text`` lines.
        ``metadata.csv`` in the folder of the audio or above it up to ``root``: ``name|text`` or ``name|text|normalised
        text`` lines (LJSpeech; the last column counts), or comma-separated with a header that names a file column
        (file_name, file, path, audio, id) and a text column (transcription, transcript, sentence, text).
        A name there is the file's, with or without its ending, and without its folders where no other file has the same name.

    Raises:
        ValueError: a transcript file that cannot be read as one (names file and line).
    """
    found = {}
    same_name = collections.Counter(path.stem for path in audio_paths)
    libri = functools.cache(_read_librispeech)
    tables = functools.cache(_read_metadata)
    for path in audio_paths:
        beside = path.with_suffix(".txt")
        text = _read_text(beside) if beside.is_file() else libri(path.parent).get(path.stem)
        folder = path.parent
        while text is None:
            relative = path.relative_to(folder)
            table = tables(folder)
            keys = [relative.as_posix(), relative.with_suffix("").as_posix()]
            if same_name[path.stem] == 1:  # a bare name says which file only where no other folder has the same
                keys += [path.name, path.stem]
            text = next((table[key] for key in keys if key in table), None)
            if folder == root or folder == folder.parent:
                break
            folder = folder.parent
        if text is not None and text.strip():
            found[path] = text.strip()
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: a transcript must be UTF-8 text, but byte {error.start} is not; convert it, as with iconv"
        ) from error


def _read_librispeech(folder: Path) -> dict[str, str]:
    """Utterance -> text of all ``*.trans.txt`` in a folder."""
    texts = {}
    for path in sorted(folder.glob("*.trans.txt")):
        for line in _read_text(path).split("\n"):
            name, _, text = line.strip().partition(" ")
            texts[name] = text
    return texts


def _read_metadata(folder: Path) -> dict[str, str]:
    """File -> text of the ``metadata.csv`` in a folder, if there is one."""
    path = folder / "metadata.csv"
    if not path.is_file():
        return {}
    lines = [line.rstrip("\r") for line in _read_text(path).split("\n")]  # splitlines() would also split at U+2028
    header = [column.strip().lower() for column in lines[0].split(",")] if lines else []
    audio_column = next((column for column in _AUDIO_COLUMNS if column in header), None)
    text_column = next((column for column in _TEXT_COLUMNS if column in header), None)
    if audio_column is not None and text_column is not None:
        rows = csv.reader(lines[1:])
        audio, text = header.index(audio_column), header.index(text_column)
        return {row[audio]: row[text] for row in rows if len(row) > max(audio, text)}
    texts = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.split("|")
        if len(fields) < 2:
            raise ValueError(
                f"{path}:{number}: a line must be `name|text` or `name|text|normalised text`, or line 1 a header with "
                f"file_name and transcription, but it is {line!r}; correct the line"
            )
        texts[fields[0].strip()] = fields[-1].strip() or fields[1]
    return texts


def count_symbols(label_lines: Iterable[str]) -> dict[str, int]:
    """Symbols of label lines with their counts, most frequent first (then by code point): the lines of a dictionary."""
    counts = collections.Counter(symbol for line in label_lines for symbol in line.split())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
